"""Sweeps that are broken while they train, and must end as if nothing had happened.

    python tests/faults/sweeping.py [--kills 10] [--seed 0] [--only SCENARIO] [--keep DIR]

Prints a JSON object for each scenario, with `error` empty where it passed. Runs are forked from a process that has
imported everything, so that each takes a second; `sgtm sweep` itself is the real one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from sgtm.commands.main import run as sgtm_process
from sgtm.commands.sweep_child import end_with
from sgtm.config import load_config
from sgtm.data.open import open_corpus
from sgtm.run.metrics import read_metrics
from sgtm.sweep.run import run_sweep

sys.path.append(str(Path(__file__).parents[1]))
from same_run import assert_same_run
from waiting import wait_until

STEPS, RUNS = 16, 4
IMPORTED = ("sgtm.training.loop", "sgtm.sweep.table", "deepspeed.runtime.zero.muon.original_muon", "torch._dynamo")
"""What a run or a sweep would import; the third brings most of the compiler, 3.6 s of CPU time in every run."""
SWEEP = """
name: {name}
runs: {folder}
base: debug
set:
  data: {{path: {folder}/corpus}}
  train: {{steps: 16, checkpoint_every: 3, eval_every: 5, eval_sequences: 4}}
variants:
  unmasked: {{masking.strategy: none}}
  sgtm: {{}}
seeds: [0, 1]
"""
FAILING = SWEEP.replace("variants:", "variants:\n  broken: {{}}").replace("[0, 1]", "[0]")


@dataclass
class Forked:
    """A process that was forked here, where all that it needs has been imported."""

    pid: int
    status: int | None = None

    def poll(self) -> int | None:
        if self.status is None:
            child, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if child else None
        return self.status

    def wait(self) -> int:
        wait_until(lambda: self.poll() is not None)
        return self.status


def fork(action: Callable[[], int], log: Path) -> Forked:
    """`action` in a process of its own, which ends with what it returns."""
    pid = os.fork()
    if pid:
        return Forked(pid)
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.closerange(3, 256)  # the lock of the sweep too, as exec does
        status = action()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def start_forked(arguments: list[str], environment: dict[str, str], log: Path) -> Forked:
    """A training process, in the place of `start_process`."""
    parent = os.getpid()

    def train() -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        end_with(parent)
        os.environ.update(environment)
        sys.argv = ["sgtm", *arguments]
        return sgtm_process()

    return fork(train, log)


@dataclass
class Trial:
    """A sweep in a folder that holds `corpus`, and what it prints."""

    folder: Path
    name: str
    text: str = SWEEP
    jobs: int = 2

    def __post_init__(self):
        self.file, self.log = self.folder / f"{self.name}.yaml", self.folder / f"{self.name}.log"
        self.sweep = self.folder / self.name
        self.file.write_text(self.text.format(name=self.name, folder=self.folder))

    def start(self) -> Forked:
        def sweep() -> int:
            os.setsid()
            return run_sweep(self.file, jobs=self.jobs, threads=1, start=start_forked)

        return fork(sweep, self.log)

    def steps(self) -> int:
        lines = [line for file in self.sweep.glob("*/metrics.jsonl") for line in read_metrics(file)]
        return sum(line["kind"] == "step" for line in lines)

    def wait_for(self, steps: int, process: Forked) -> None:
        while process.poll() is None and self.steps() < steps:
            time.sleep(0.005)

    def table(self) -> str:
        return (self.sweep / "table.jsonl").read_text()

    def ends_like(self, whole: Trial) -> None:
        assert self.table() == whole.table(), "another table"
        for config in sorted(whole.sweep.glob("*/config.yaml")):
            assert_same_run(self.sweep / config.parent.name, config.parent)


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """When each file of the runs and logs was last written, and what it holds."""
    paths = [path for part in ("*-s?", "logs") for path in folder.glob(f"{part}/**/*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(paths)}


def killed(folder: Path, whole: Trial, kills: int, chance: random.Random) -> None:
    """SIGKILL, to all processes or to the sweep alone, at so many random moments of one sweep."""
    trial = Trial(folder, "killed")
    for target in sorted(chance.choices(range(RUNS * STEPS - 4), k=kills)):
        process = trial.start()
        trial.wait_for(target, process)
        time.sleep(chance.uniform(0, 0.3))
        assert process.poll() is None, f"it ended by itself with {process.status}"
        if chance.random() < 0.5:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert trial.start().wait() == 0
    trial.ends_like(whole)


def stopped(folder: Path, whole: Trial, *_) -> None:
    """SIGTERM to the sweep: the runs save their checkpoints, and the next call resumes them."""
    trial = Trial(folder, "stopped")
    process = trial.start()
    trial.wait_for(5, process)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; finished runs and checkpoints are kept; continue: sgtm sweep" in trial.log.read_text()
    logs = "".join(file.read_text() for file in trial.sweep.glob("logs/*"))
    assert "stopped by a signal after step" in logs, logs
    assert trial.start().wait() == 0
    trial.ends_like(whole)


def repeated(folder: Path, whole: Trial, *_) -> None:
    """A finished sweep that is called again touches no run and no log, and writes the same table."""
    before, table = files(whole.sweep), whole.table()
    assert len([name for name in before if name.endswith("config.yaml")]) == RUNS
    (whole.sweep / "table.jsonl").unlink()
    assert whole.start().wait() == 0
    assert files(whole.sweep) == before, "files of finished runs were touched"
    assert whole.table() == table


def failing(folder: Path, *_) -> None:
    """A run that fails is reported with its log and status; those after it finish, and the exit status is 1."""
    trial = Trial(folder, "failing", FAILING, jobs=1)
    trial.sweep.mkdir()
    (trial.sweep / "broken-s0").touch()
    assert trial.start().wait() == 1
    printed = trial.log.read_text()
    log = trial.sweep / "logs" / "broken-s0.log"
    assert f"failed: broken-s0 ended with status 2; log: {log}" in printed, printed
    assert "is a file, in the place of the run directory" in log.read_text()
    rows = {row["variant"]: row for row in map(json.loads, trial.table().splitlines())}
    assert {name: row["finished"] for name, row in rows.items()} == {"broken": 0, "unmasked": 1, "sgtm": 1}
    assert rows["broken"]["full_retain"] is None


SCENARIOS = {one.__name__: one for one in (killed, stopped, repeated, failing)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SCENARIOS)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new folder for runs and logs, which are then kept")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    for module in IMPORTED:
        importlib.import_module(module)
    folder = (args.keep or Path(tempfile.mkdtemp())).absolute()
    folder.mkdir(exist_ok=True)
    failed = 0
    try:
        written = open_corpus(load_config("debug", [f"--runs={folder / 'made'}"])).path
        (folder / "corpus").symlink_to(Path(written).resolve())
        whole = Trial(folder, "whole")
        assert whole.start().wait() == 0, whole.log.read_text()
        for name, scenario in SCENARIOS.items():
            if args.only in (None, name):
                began, error = time.monotonic(), ""
                try:
                    scenario(folder, whole, args.kills, random.Random(args.seed))
                except Exception as failure:
                    error = f"{type(failure).__name__}: {failure}"
                    with suppress(OSError):
                        error += "\n" + (folder / f"{name}.log").read_text()[-2000:]
                failed += bool(error)
                seconds = round(time.monotonic() - began, 1)
                print(json.dumps({"scenario": name, "seconds": seconds, "error": error}), flush=True)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
