"""A run that is killed and resumed is bitwise the uninterrupted one.

The command line is started, waits in a step (paused.py), is sent SIGTERM or SIGKILL and resumed: weights, both moments,
step counts, every logged loss and every evaluation must equal those of a run left alone. Logging, evaluations and
checkpoints have intervals that do not divide one another.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from same_run import assert_same_run, wait_for_step
from waiting import PATIENCE

from sgtm.run.checkpoint import find_latest

STEPS = 30
OPTIONS = [
    f"--train.steps={STEPS}",
    "--train.checkpoint_every=5",
    "--train.tokens_per_step=1024",
    "--train.eval_every=6",
    "--train.log_every=4",
]


TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def start(
    runs: Path, name: str, *extra: str, launcher: list[str] | None = None, pause: int | None = None
) -> subprocess.Popen:
    """The command line, under `launcher` where there is one; `pause`: it waits in its step of that number."""
    sgtm = ["-m", "sgtm"] if pause is None else [str(Path(__file__).with_name("paused.py")), str(pause)]
    command = [sys.executable, *(launcher or []), *sgtm, "train", "debug", f"--runs={runs}", f"--name={name}"]
    return subprocess.Popen([*command, *OPTIONS, *extra], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    finish(start(runs, "whole"))
    return runs / "whole"


def step_of(run: Path) -> int:
    return int(find_latest(run).name.removeprefix("step_"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_and_resumed(uninterrupted: Path, number: signal.Signals):
    runs = uninterrupted.parent
    name = f"stopped-by-{number.name}"
    process = start(runs, name, pause=14)
    wait_for_step(runs / name, 12)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=PATIENCE)
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert f"checkpoint saved; continue: sgtm train {runs / name} --resume" in " ".join(output.split())
    else:
        assert process.returncode == -signal.SIGKILL
    # The signal comes before or while the 14th step waits for it, and is heeded after the step in progress, or in the
    # evaluation after step 12.
    # The one after step 10 may still be in the making when a kill comes.
    expected = {signal.SIGTERM: {12, 13, 14}, signal.SIGKILL: {5, 10}}[number]
    assert step_of(runs / name) in expected
    output = finish(start(runs, name, "--resume"))
    assert "resumed after step" in output
    assert_same_run(runs / name, uninterrupted)


def test_two_ranks_stopped_killed_and_resumed(tmp_path: Path):
    """SIGTERM to the launcher, then SIGKILL to it and both ranks, in one run under torchrun and ZeRO-2."""

    def launch(name: str, *extra: str, pause: int | None = None) -> subprocess.Popen:
        return start(tmp_path, name, "--distributed.zero_stage=2", *extra, launcher=TWO_RANKS, pause=pause)

    process = launch("killed", pause=10)
    wait_for_step(tmp_path / "killed", 8)
    process.terminate()
    output, _ = process.communicate(timeout=PATIENCE)
    assert "checkpoint saved" in output and "terminate called" not in output, output
    assert output.count("Traceback") == 1, "torchrun's own: " + output
    # Ranks hear of one another's signal with the gradient of a step: the one after the wait at the latest.
    assert step_of(tmp_path / "killed") in {9, 10, 11}

    process = launch("killed", "--resume", pause=8)
    wait_for_step(tmp_path / "killed", 16)
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.communicate(timeout=PATIENCE)
    assert step_of(tmp_path / "killed") in {9, 10, 11, 15}

    assert "resumed after step" in finish(launch("killed", "--resume"))
    finish(launch("whole"))
    assert len(list(find_latest(tmp_path / "whole").glob("*optim_states.pt"))) == 2
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_an_existing_run_directory_is_refused(uninterrupted: Path):
    process = start(uninterrupted.parent, "whole")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "--resume" in output and "--overwrite" in output and "Traceback" not in output


def test_a_resumed_run_must_have_the_same_config(uninterrupted: Path):
    process = start(uninterrupted.parent, "whole", "--resume", "--optimizer.lr=0.5")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "optimizer.lr" in output and "0.5" in output and "Traceback" not in output
