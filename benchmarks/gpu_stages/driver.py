"""Run stages within a budget of seconds: each unit is a process in its own process group, with a time limit.

A stage is a list of units; a unit is one command. The outcome of each is a row of `stages.jsonl`, written at once:

    done     it ended with status 0
    failed   it ended with another status
    crashed  a signal ended it
    cut      it was killed at its limit; the next run continues it

If a unit crashes or hangs in one of its items (journal.py), the item gets a row with that outcome and the unit is
restarted for the remaining items. A failing unit never stops the units after it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from journal import AGAIN, OK, Items, Journal, last_by

STAGES = "stages.jsonl"
BENCHMARKS = Path(__file__).parents[1]
GUARD = Path(__file__).with_name("guard.py")
DONE, FAILED, CRASHED, CUT = "done", "failed", "crashed", "cut"
FINISHED = (DONE, FAILED, CRASHED)  # not run again
LEAST = 0.5  # seconds; with less time left no unit is started
POLL = 0.02
TAIL = 1500  # characters of what a unit printed last


@dataclass(frozen=True)
class Unit:
    """One process.

    command  what to run, within a limit in seconds
    rows     name of the file, in the folder of the run, to which it appends its rows
    weight   of the time of its stage, beside the other units
    """

    name: str
    command: Callable[[float], list[str]]
    rows: str
    weight: float = 1.0
    environ: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Units that run one after another, or `parallel` at a time.

    share  of the budget, beside the other stages
    item   share of its limit that one item of a unit may take, before it counts as hanging
    """

    name: str
    title: str
    share: float
    units: Sequence[Unit]
    parallel: int = 1
    item: float = 0.5


@dataclass(frozen=True)
class Ended:
    """A process that ended or was killed: at its limit (`cut`), or because an item hung (`hung`)."""

    code: int = 0
    cut: bool = False
    hung: bool = False
    item: str | None = None
    tail: str = ""

    @property
    def signal(self) -> str | None:
        number = -self.code if self.code < 0 else self.code - 128
        return signal.Signals(number).name if number in set(signal.Signals) and not self.cut else None


Execute = Callable[[Stage, Unit, float], Ended]


class Driver:
    """Stages in `folder`, within `budget` seconds from `began` on.

    again    repeat what failed or crashed before
    execute  runs a unit within a limit; clock: seconds. Tests replace both.
    """

    def __init__(
        self,
        folder: Path,
        budget: float,
        *,
        began: float | None = None,
        again: bool = False,
        execute: Execute | None = None,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[str], None] = print,
    ):
        self.folder, self.clock, self.write = folder, clock, write
        self.execute = execute or Processes(folder)
        self.again = again
        self.began = clock() if began is None else began
        self.ends = self.began + budget
        self.journal = Journal(folder / STAGES)
        self.finished = {
            (row["stage"], row["unit"])
            for row in last_by(self.journal.rows(), "stage", "unit")
            if row["outcome"] == DONE or (row["outcome"] in FINISHED and not again)
        }

    def run(self, stages: Sequence[Stage]) -> None:
        """Run all unfinished units; a stage's limit is its share of the time left, so unused time passes on."""
        if self.again:
            self._reopen([(stage, unit) for stage in stages for unit in stage.units])
        open_stages = [stage for stage in stages if self._open(stage)]
        for stage in stages:
            if stage not in open_stages:
                self.write(f"{stage.name}: finished before")
                continue
            shares = sum(later.share for later in open_stages[open_stages.index(stage) :])
            limit = self.left() * stage.share / shares
            if limit < LEAST:
                self.write(f"{stage.name}: no time left")
                continue
            self.write(f"{self.clock() - self.began:6.1f} s  {stage.name}: {stage.title}, up to {limit:.0f} s")
            self._run_stage(stage, self.clock() + limit)

    def left(self) -> float:
        return self.ends - self.clock()

    def _open(self, stage: Stage) -> list[Unit]:
        return [unit for unit in stage.units if (stage.name, unit.name) not in self.finished]

    def _reopen(self, units: Sequence[tuple[Stage, Unit]]) -> None:
        """Mark failed items, and their units, as unfinished again."""
        for stage, unit in units:
            journal = Journal(self.folder / unit.rows)
            rows = last_by([row for row in journal.rows() if "item" in row], "item")
            failed = [row["item"] for row in rows if row.get("outcome", OK) != OK]
            journal.add(*({"item": item, "outcome": AGAIN} for item in failed))
            if failed:
                self.finished.discard((stage.name, unit.name))

    def _run_stage(self, stage: Stage, ends: float) -> None:
        units = self._open(stage)
        if stage.parallel > 1:
            with ThreadPoolExecutor(stage.parallel) as pool:
                list(pool.map(lambda unit: self._run_unit(stage, unit, ends), units))
            return
        for i, unit in enumerate(units):
            weights = sum(later.weight for later in units[i:])
            self._run_unit(stage, unit, self.clock() + (ends - self.clock()) * unit.weight / weights)

    def _run_unit(self, stage: Stage, unit: Unit, ends: float) -> None:
        began, limit = self.clock(), ends - self.clock()
        rows, seen = Journal(self.folder / unit.rows), set()
        outcome, ended = CUT, Ended(cut=True)
        while (left := ends - self.clock()) >= LEAST:
            ended = self.execute(stage, unit, left)
            outcome = _outcome(ended)
            items = {row["item"] for row in rows.rows() if "item" in row}
            if ended.item and not ended.cut and outcome in FINISHED[1:]:
                how = "hung" if ended.hung else outcome
                error = f"killed after {stage.item:.0%} of the stage's time" if ended.hung else ended.signal
                rows.add({"item": ended.item, "outcome": how, "error": error or f"exit status {ended.code}"})
                items.add(ended.item)
            elif ended.code != Items.RESTART:
                break
            if items <= seen:
                break
            seen = items
            outcome = CUT  # if no time is left for the rest
        row = {"stage": stage.name, "unit": unit.name, "outcome": outcome}
        row |= {"seconds": round(self.clock() - began, 2), "limit": round(limit, 2)}
        if outcome != DONE:
            row |= {"exit": ended.code, "signal": ended.signal, "item": ended.item, "tail": ended.tail}
        self.journal.add(row)
        self.write(f"{self.clock() - self.began:6.1f} s  {stage.name}/{unit.name}: {outcome}{_where(ended, outcome)}")


def _outcome(ended: Ended) -> str:
    if ended.cut:
        return CUT
    if ended.code == 0:
        return DONE
    return CRASHED if ended.signal or ended.hung else FAILED


def _where(ended: Ended, outcome: str) -> str:
    item = f" in {ended.item}" if ended.item and outcome != DONE else ""
    lines = ended.tail.strip().splitlines()
    return item + (f": {lines[-1][:160]}" if lines and outcome not in (DONE, CUT) else "")


class Processes:
    """Units as processes of this machine; what one prints goes to logs/<stage>-<unit>.log."""

    def __init__(self, folder: Path, lock: int | None = None):
        self.folder, self.lock = folder, lock
        self.logs = folder / "logs"

    def __call__(self, stage: Stage, unit: Unit, limit: float) -> Ended:
        self.logs.mkdir(parents=True, exist_ok=True)
        log, current = (self.logs / f"{stage.name}-{unit.name}.{end}" for end in ("log", "item"))
        current.unlink(missing_ok=True)
        environ = environment() | unit.environ | {"SGTM_GPU_ITEM": str(current)}
        began = time.monotonic()
        with open(log, "ab") as output:
            before = output.tell()
            process = subprocess.Popen(
                [sys.executable, str(GUARD), *unit.command(limit)], stdin=subprocess.PIPE, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True, env=environ,
                pass_fds=[] if self.lock is None else [self.lock],
            )  # fmt: skip
        try:
            cut, hung = self._watch(process, current, began + limit, limit * stage.item)
        finally:
            kill_group(process)
        with open(log, "rb") as output:
            output.seek(max(before, output.seek(0, os.SEEK_END) - TAIL))
            tail = output.read().decode(errors="replace")
        item = current.read_text() if current.exists() else None
        return Ended(process.returncode, cut, hung, item, tail)

    def _watch(self, process: subprocess.Popen, current: Path, ends: float, patience: float) -> tuple[bool, bool]:
        """Wait for the process; returns whether its limit, or that of an item, came first."""
        item, since = None, time.monotonic()
        while process.poll() is None:
            now = time.monotonic()
            if now >= ends:
                return True, False
            stamp = _stamp(current)
            if stamp != item:
                item, since = stamp, now
            elif item and now - since >= patience:
                return False, True
            time.sleep(POLL)
        return False, False


def environment() -> dict[str, str]:
    """Environment of a stage: this checkout's code, without the shell's variables that select kernels."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("SGTM_")}
    paths = [*map(str, (BENCHMARKS, BENCHMARKS.parent / "kernels", BENCHMARKS.parent)), variables.get("PYTHONPATH", "")]
    # cuBLAS: as in training, where kernels.deterministic is the default; without it a strictly deterministic op raises.
    added = {"PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return variables | added | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _stamp(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def kill_group(process: subprocess.Popen) -> None:
    """Kill the process group that this process leads."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()
