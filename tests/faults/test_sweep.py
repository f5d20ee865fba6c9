"""A sweep that is killed, stopped or called again, or one of whose runs fails, ends with the table of one left alone.

sweeping.py has the scenarios, on forked processes; the last test kills a real one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from same_run import wait_for_step
from waiting import wait_until

SCRIPT = Path(__file__).with_name("sweeping.py")


@pytest.fixture(scope="module")
def errors() -> dict[str, str]:
    """What went wrong in each scenario."""
    done = subprocess.run([sys.executable, SCRIPT, "--kills", "10"], capture_output=True, text=True)
    messages = {line["scenario"]: line["error"] for line in map(json.loads, done.stdout.splitlines())}
    return messages or {"all": done.stderr}


@pytest.mark.parametrize("scenario", ["killed", "stopped", "repeated", "failing"])
def test_sweep_ends_as_if_left_alone(errors, scenario: str):
    assert errors.get(scenario, errors) == ""


@pytest.mark.cold  # a fork has a server for a child, too
def test_run_saves_and_ends_when_its_sweep_is_killed(tmp_path: Path):
    file = tmp_path / "one.yaml"
    train = "{steps: 100000, checkpoint_every: 0}"
    file.write_text(f"base: debug\nruns: {tmp_path}\nset: {{train: {train}}}\nvariants: {{sgtm: {{}}}}\n")
    sweep = subprocess.Popen([sys.executable, "-m", "sgtm", "sweep", str(file)], stdout=subprocess.DEVNULL)
    run = tmp_path / "one" / "sgtm-s0"
    wait_for_step(run, 1)
    (child,) = psutil.Process(sweep.pid).children()
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()
    try:
        wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    finally:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    assert "stopped by a signal after step" in (tmp_path / "one" / "logs" / "sgtm-s0.log").read_text()
