"""Runs that are broken at random moments must end as if nothing had happened.

    python tests/faults/campaign.py [--faults 200] [--seed 0] [--jobs 2] [--stages 0 1 2 3] [--keep DIR]

Every trial starts a run through the command line, breaks it in one of the ways of breaking.py at a random moment, and
goes on with `--resume auto` until it is done; one trial in three is broken a second time on the way. It passes if

- every checkpoint that was reported as saved was whole when the run was broken, unless a newer whole one was there;
- weights, moments and step counts at the end, and every logged loss and evaluation, are bitwise those of a run that was
  left alone, on as many ranks and in the same ZeRO stage.

One and two ranks. Which faults, stages and moments there are follows from the seed; where in the program a moment falls
depends on the machine. Exit status 1, with the trials that failed, if any does.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
from breaking import (
    EVERY,
    FAULTS,
    KILLS,
    STEPS,
    WEIGHTS,
    Attempt,
    Moment,
    NoFault,
    cut_network,
    damage,
    full_disk,
    kill_all,
    start,
)

from sgtm.config import load_config
from sgtm.data.open import open_corpus
from sgtm.run.checkpoint import finished, newest_whole, step_of

sys.path.append(str(Path(__file__).parents[1]))
from same_run import assert_same_run


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
        done = step_of(checkpoints[0]) if (checkpoints := finished(self.run)) else 0
        step = self.chance.randrange(min(done, STEPS - 1), STEPS)
        return Moment(self.run / "metrics.jsonl", step, self.chance.uniform(0, self.seconds / STEPS))

    def broken(self, fault: str) -> None:
        """One attempt that is broken, or has ended before that. Raises NoFault if there was nothing to break."""
        moment = self.moment(fault)
        checkpoints = [path.name for path in finished(self.run) if path.name not in self.damaged]
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
            expected = 128 + signal.SIGTERM if self.ranks == 1 else 0
            assert set(statuses) == {expected}, f"SIGTERM ended the ranks with {statuses}"
        check_reported(self.run, self.log, checkpoints)
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
        assert_same_run(this.run, folder / "trials" / f"whole-{stage}-{ranks}")
    except Exception as failure:
        text = this.log.read_text(errors="replace") if this.log.exists() else ""
        error = (
            f"{type(failure).__name__}: {failure}; the last attempt printed:\n{text.rpartition('ATTEMPT')[2][-1500:]}"
        )
    return {"trial": number, "stage": stage, "ranks": ranks, "faults": done, "error": error}


def check_reported(run: Path, log: Path, before: list[str]) -> None:
    """The newest whole checkpoint is as new as any that the attempt reported, or found: `before`, by name."""
    expected = max(reported(log) + before, default="")
    checkpoint, wrong = newest_whole(finished(run))
    assert not expected or (checkpoint and checkpoint.name >= expected), (
        f"{expected} is lost: there is {checkpoint}; {wrong}"
    )


def reported(log: Path) -> list[str]:
    """Names of the checkpoints that the last attempt has said it saved."""
    text = "".join(log.read_text(errors="replace").split())  # the terminal's width breaks lines
    words = text.rpartition("ATTEMPT")[2].split("checkpointsaved:")
    return [f"step_{word.partition('step_')[2][:8]}" for word in words[1:]]


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
