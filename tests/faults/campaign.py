"""Runs that are broken at random moments must end as if nothing had happened.

    python tests/faults/campaign.py [--faults 200] [--seed 0] [--jobs 2] [--stages 0 1 2 3] [--keep DIR]

Every trial starts a run through the command line, breaks it in one of FAULTS' ways at a random moment, and goes on with
`--resume auto` until it is done; one trial in three is broken a second time on the way. It passes if

- every checkpoint that was reported as saved was whole when the run was broken, unless a newer whole one was there;
- weights, moments and step counts at the end, and every logged loss and evaluation, are bitwise those of a run that was
  left alone, on as many ranks and in the same ZeRO stage.

One and two ranks. The ranks are forked from a process that has imported everything, so that a trial
takes seconds. Which faults, stages and moments there are follows from the seed; where in the program a moment falls
depends on the machine. Exit status 1, with the trials that failed, if any does.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch

from sgtm.__main__ import run as sgtm_process
from sgtm.config import load_config
from sgtm.data.open import open_corpus
from sgtm.distributed.storage import PARTS, Stored
from sgtm.train import loop  # noqa: F401 (all that a rank needs is imported before it is forked)
from sgtm.train.checkpoint import finished, newest_whole, step_of
from sgtm.train.metrics import read_metrics

STEPS, EVERY = 24, 3
OPTIONS = [
    f"--train.steps={STEPS}",
    f"--train.checkpoint_every={EVERY}",
    "--train.keep_last=3",
    "--train.eval_every=8",
    "--train.eval_sequences=4",
    "--distributed.timeout_minutes=0.4",
]
PATIENCE = 90  # seconds for an attempt


@dataclass
class Attempt:
    """One start of a run on forked ranks."""

    ranks: list[int]
    log: Path
    began: float

    def alive(self) -> bool:
        return any(status is None for status in self.statuses())

    def statuses(self) -> list[int | None]:
        """Exit status of each rank, None while it runs; negative: the signal that ended it."""
        for pid in self.ranks:
            if pid not in self._ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self._ended[pid] = os.waitstatus_to_exitcode(status)
        return [self._ended.get(pid) for pid in self.ranks]

    def wait(self, patience: float = PATIENCE) -> list[int]:
        """Exit statuses of all ranks. Raises AssertionError if they do not end by themselves."""
        end = time.monotonic() + patience
        while self.alive():
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                raise AssertionError(f"ranks {self.statuses()} did not end in {patience} s")
            time.sleep(0.005)
        return self.statuses()

    def signal(self, number: int, ranks: list[int] | None = None) -> None:
        for pid in ranks or self.ranks:
            if pid not in self._ended:
                os.kill(pid, number)

    _ended: dict[int, int] = field(default_factory=dict)


def start(run: Path, stage: int, ranks: int, log: Path, before: Callable[[int], None] = lambda rank: None) -> Attempt:
    """`sgtm train debug --resume auto` on forked ranks; `before(rank)` is called in each."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    command = ["sgtm", "train", "debug", "--resume", "auto", f"--runs={run.parent}", f"--name={run.name}", *OPTIONS]
    command += [f"--distributed.zero_stage={stage}", f"--data.path={run.parents[1] / 'corpus'}"]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                os.write(descriptor, b"ATTEMPT\n" if rank == 0 else b"")
                if ranks > 1:
                    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                    os.environ.update({name: str(value) for name, value in (place | address).items()})
                sys.argv = command
                before(rank)
                status = sgtm_process()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        pids.append(pid)
    return Attempt(pids, log, time.monotonic())


def kill_all(attempt: Attempt, _) -> None:
    attempt.signal(signal.SIGKILL)


def kill_one(attempt: Attempt, chance: random.Random) -> None:
    """The others must end by themselves."""
    attempt.signal(signal.SIGKILL, [chance.choice(attempt.ranks)])


def terminate(attempt: Attempt, chance: random.Random) -> None:
    attempt.signal(signal.SIGTERM, chance.choice([attempt.ranks, attempt.ranks[-1:]]))


def stop_one(attempt: Attempt, chance: random.Random) -> None:
    """A rank that hangs: the others end after the timeout, it is killed then."""
    hung = chance.choice(attempt.ranks)
    attempt.signal(signal.SIGSTOP, [hung])
    others = [pid for pid in attempt.ranks if pid != hung]
    end = time.monotonic() + PATIENCE
    while any(status is None for pid, status in zip(attempt.ranks, attempt.statuses(), strict=True) if pid in others):
        if time.monotonic() > end:
            attempt.signal(signal.SIGKILL)
            raise AssertionError("a rank waits for one that hangs beyond the timeout")
        time.sleep(0.01)
    attempt.signal(signal.SIGKILL, [hung])


class NoFault(Exception):
    """There was nothing to damage yet."""


def damage(run: Path, chance: random.Random) -> set[str]:
    """Cut short or flip a bit of a file of the newest checkpoint, if another is there to go back to; its name.

    Raises NoFault if none is.
    """
    there = finished(run)
    if len(there) < 2:
        raise NoFault
    file = chance.choice(sorted(path for path in there[0].iterdir()))
    content = bytearray(file.read_bytes())
    if chance.random() < 0.5:
        del content[chance.randrange(len(content)) :]
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    return {there[0].name}


@dataclass
class Moment:
    """`delay` seconds after the run has logged so many steps; 0: after it is started."""

    metrics: Path
    step: int
    delay: float

    def wait(self, while_: Callable[[], bool] = lambda: True) -> None:
        mark = f'"kind": "step", "step": {self.step},'
        while self.step and while_() and not (self.metrics.exists() and mark in self.metrics.read_text()):
            time.sleep(0.002)
        end = time.monotonic() + self.delay
        while while_() and time.monotonic() < end:
            time.sleep(0.001)


def full_disk(room: int, moment: Moment) -> Callable[[int], None]:
    """From then on no file of any rank may grow beyond `room` bytes: a full disk, without a disk of its own."""

    def fill() -> None:
        moment.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    def before(rank: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        threading.Thread(target=fill, daemon=True).start()

    return before


def cut_network(rank: int, moment: Moment) -> Callable[[int], None]:
    """All connections of this rank are shut down then, for both ends."""

    def cut() -> None:
        moment.wait()
        shutdown = ctypes.CDLL(None).shutdown
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor > 2:
                shutdown(descriptor, socket.SHUT_RDWR)  # fails for what is no socket

    def before(this: int) -> None:
        if this == rank:
            threading.Thread(target=cut, daemon=True).start()

    return before


KILLS = {"SIGKILL": kill_all, "SIGKILL of one rank": kill_one, "SIGTERM": terminate, "a rank hangs": stop_one}
FAULTS = {
    1: ("SIGKILL", "SIGTERM", "damaged checkpoint", "full disk"),
    2: ("SIGKILL", "SIGKILL of one rank", "SIGTERM", "damaged checkpoint", "full disk", "cut network", "a rank hangs"),
}
WEIGHTS = {"a rank hangs": 0.3}  # each waits for the timeout


@dataclass
class Trial:
    """A run that is broken again and again.

    seconds  that a whole run takes
    damaged  names of the checkpoints that were damaged on purpose
    """

    run: Path
    log: Path
    stage: int
    ranks: int
    seconds: float
    chance: random.Random
    damaged: set[str] = field(default_factory=set)

    def start(self, before: Callable[[int], None] = lambda rank: None) -> Attempt:
        return start(self.run, self.stage, self.ranks, self.log, before)

    def some_fault(self) -> str:
        (fault,) = self.chance.choices(FAULTS[self.ranks], [WEIGHTS.get(fault, 1.0) for fault in FAULTS[self.ranks]])
        return fault

    def moment(self, fault: str) -> Moment:
        """Any time from the start on, or (three times in four) soon after a step of what is left to do."""
        if fault != "damaged checkpoint" and self.chance.random() < 1 / 4:
            return Moment(self.run / "metrics.jsonl", 0, self.chance.uniform(0, 1.1 * self.seconds))
        done = step_of(there[0]) if (there := finished(self.run)) else 0
        step = self.chance.randrange(min(done, STEPS - 1), STEPS)
        return Moment(self.run / "metrics.jsonl", step, self.chance.uniform(0, self.seconds / STEPS))

    def broken(self, fault: str) -> None:
        """One attempt that is broken, or has ended before that. Raises NoFault if there was nothing to break."""
        moment, there = self.moment(fault), [path.name for path in finished(self.run) if path.name not in self.damaged]
        before: Callable[[int], None] = lambda rank: None  # noqa: E731
        if fault == "full disk":
            before = full_disk(self.chance.choice([0, 300, 4096, 60_000, self.chance.randrange(400_000)]), moment)
        elif fault == "cut network":
            before = cut_network(self.chance.randrange(self.ranks), moment)
        attempt = self.start(before)
        if fault in (*KILLS, "damaged checkpoint"):
            moment.wait(attempt.alive)
        KILLS.get(fault, kill_all if fault == "damaged checkpoint" else lambda *_: None)(attempt, self.chance)
        statuses = attempt.wait()
        if fault == "SIGTERM" and -signal.SIGTERM not in statuses:  # it was there to be heeded
            assert set(statuses) == {0}, f"SIGTERM ended the ranks with {statuses}"
        check_reported(self.run, self.log, there)
        if fault == "damaged checkpoint":
            self.damaged |= damage(self.run, self.chance)


def trial(number: int, seed: int, folder: Path, seconds: dict[tuple[int, int], float]) -> dict:
    """One run, broken once or twice; `seconds` is what a whole run takes. Returns what was done, and `error` if any."""
    chance = random.Random(f"{seed}-{number}")
    stage, ranks = chance.choice(sorted(seconds))
    done, error = [], ""
    this = Trial(folder / "trials" / f"{number}", folder / f"{number}.log", stage, ranks, seconds[stage, ranks], chance)
    try:
        for _ in range(1 + (chance.random() < 1 / 3)):
            fault = this.some_fault()
            with suppress(NoFault):
                this.broken(fault)
                done.append(fault)
        statuses = this.start().wait()
        assert set(statuses) == {0}, f"the resumed run ended with {statuses}"
        assert_same(this.run, folder / "trials" / f"whole-{stage}-{ranks}")
    except Exception as failure:
        text = this.log.read_text(errors="replace") if this.log.exists() else ""
        error = (
            f"{type(failure).__name__}: {failure}; the last attempt printed:\n{text.rpartition('ATTEMPT')[2][-1500:]}"
        )
    return {"trial": number, "stage": stage, "ranks": ranks, "faults": done, "error": error}


def check_reported(run: Path, log: Path, before: list[str]) -> None:
    """The newest whole checkpoint is as new as any that the attempt reported, or found: `before`, by name."""
    expected = max(reported(log) + before, default="")
    found, wrong = newest_whole(finished(run))
    assert not expected or (found and found.name >= expected), f"{expected} is lost: there is {found}; {wrong}"


def reported(log: Path) -> list[str]:
    """Names of the checkpoints that the last attempt has said it saved."""
    text = "".join(log.read_text(errors="replace").split())  # the terminal's width breaks lines
    words = text.rpartition("ATTEMPT")[2].split("checkpointsaved:")
    return [f"step_{word.partition('step_')[2][:8]}" for word in words[1:]]


def assert_same(run: Path, other: Path) -> None:
    """Bitwise the same end: weights, moments, counts, losses and evaluations."""
    ours, theirs = (Stored(finished(path)[0]) for path in (run, other))
    assert ours.client["state"]["step"] == theirs.client["state"]["step"] == STEPS, "not at its last step"
    assert ours.client["optimizer_steps"] == theirs.client["optimizer_steps"], "the optimizer's step counts differ"
    for name in theirs.shapes:
        for part in PARTS:
            assert torch.equal(ours.read(name, part), theirs.read(name, part)), f"{part} of {name} differs"
    assert metrics(run) == metrics(other), "metrics.jsonl differs"


def metrics(run: Path) -> list[dict]:
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] != "checkpoint"]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def whole_runs(folder: Path, stages: list[int]) -> dict[tuple[int, int], float]:
    """A run left alone for every stage and number of ranks; returns the seconds of each."""
    seconds = {}
    for stage in stages:
        for ranks in (1, 2):
            log = folder / f"whole-{stage}-{ranks}.log"
            attempt = start(folder / "trials" / f"whole-{stage}-{ranks}", stage, ranks, log)
            assert set(attempt.wait()) == {0}, log.read_text()
            expected = [f"step_{step:08d}" for step in range(EVERY, STEPS + 1, EVERY)]
            assert reported(log) == expected, f"it reports {reported(log)}, and should {expected}"
            seconds[stage, ranks] = time.monotonic() - attempt.began
    return seconds


def campaign(faults: int, seed: int, jobs: int, stages: list[int], folder: Path) -> list[dict]:
    """Trials until so many faults have been tried."""
    (folder / "trials").mkdir(parents=True)
    written = open_corpus(load_config("debug", [f"--runs={folder / 'made'}"])).path
    (folder / "corpus").symlink_to(Path(written).resolve())
    seconds = whole_runs(folder, stages)
    results: list[dict] = []
    with get_context("fork").Pool(jobs) as pool:
        tasks = ((number, seed, folder, seconds) for number in range(10**9))
        while sum(len(result["faults"]) for result in results) < faults:
            results += pool.starmap(trial, [next(tasks) for _ in range(jobs)], chunksize=1)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--stages", type=int, nargs="+", default=[0, 1, 2, 3], metavar="N", help="of ZeRO (default: all)"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new folder for runs and logs, which are then kept")
    args = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    folder = args.keep or Path(tempfile.mkdtemp())  # a TemporaryDirectory would be deleted by every rank that ends
    try:
        results = campaign(args.faults, args.seed, args.jobs, args.stages, folder)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    failed = [result for result in results if result["error"]]
    for result in failed:
        error = result.pop("error")
        print(f"FAILED {json.dumps(result)}: {error}")
    counts = Counter(fault for result in results for fault in result["faults"])
    summary = ", ".join(f"{fault} {count}" for fault, count in counts.most_common())
    print(
        f"seed {args.seed}: {counts.total()} faults in {len(results)} runs ({summary}); {len(failed)} runs did not end "
        f"as if left alone or lost a checkpoint; {time.monotonic() - began:.0f} s"
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
