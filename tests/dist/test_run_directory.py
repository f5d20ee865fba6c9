"""One process at a time trains a run, and all ranks see the same directory of runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ranks import run_ranks

HOLDER = """
import sys, time
from pathlib import Path
from sgtm.run.directory import _take
_take(Path(sys.argv[1]), Path("run"), 0.0, locks := [])
print("locked", flush=True)
time.sleep(100)
"""


def hold(folder: str) -> None:
    import torch.distributed as dist

    from sgtm.run import directory
    from sgtm.run.directory import locked_run

    run, lock = Path(folder, "runs", "mine"), Path(folder, "runs", ".mine.lock")
    other = None
    if dist.get_rank() == 0:
        lock.parent.mkdir()
        other = subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "locked\n"
    dist.barrier()
    with pytest.raises(ValueError, match=r"mine is being trained by process \d+ on .*; wait for it"), locked_run(run):
        pytest.fail("another process has it")
    if other:
        threading.Timer(1, lambda: other.send_signal(signal.SIGKILL)).start()

    for patience in (60.0, 0.0):  # until it is killed; what it leaves behind does not matter
        with locked_run(run, patience):
            assert not other or other.wait(10) == -signal.SIGKILL
            assert lock.read_text().endswith(f"on {os.uname().nodename}")
            dist.barrier()
        dist.barrier()
        assert not lock.exists()
        dist.barrier()

    directory.VISIBLE_WITHIN = 0.3
    own = Path(folder, f"of-{dist.get_rank()}", "mine")
    with (
        pytest.raises(ValueError, match=r"of-1 on .* is not the directory that rank 0 has \(.*shared"),
        locked_run(own),
    ):
        pytest.fail("each rank has a directory of its own")

    directory.VISIBLE_WITHIN = 30.0
    slow = Path(folder, "slow")
    if dist.get_rank() == 1:  # as a file system that takes a while to show what another node has written
        read = Path.read_text
        shown = time.monotonic() + 0.5
        Path.read_text = lambda path: read(path) if time.monotonic() > shown else ""
    with locked_run(slow):
        pass


def test_one_at_a_time_and_the_same_for_all_ranks(tmp_path: Path):
    run_ranks(hold, 2, str(tmp_path))
