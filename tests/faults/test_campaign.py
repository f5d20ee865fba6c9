"""A small campaign of faults at random moments; `make fault-campaign` is the large one.

What it does not see, tests/dist/test_checkpoint.py does: tensors that change while they are written, which takes a
slower disk.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CAMPAIGN = Path(__file__).with_name("campaign.py")


def test_broken_runs_end_as_if_left_alone():
    command = [sys.executable, CAMPAIGN, "--faults", "8", "--jobs", "1", "--stages", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "; 0 runs did not end as if left alone or lost a checkpoint" in done.stdout
    assert int(done.stdout.partition(": ")[2].partition(" faults")[0]) >= 8
