"""Progress of all runs of a sweep: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

import rich.progress
from rich.console import Console

from sgtm.estimate.shapes import parameter_sizes
from sgtm.process.signals import ENDED_EARLY
from sgtm.sweep.file import Run
from sgtm.sweep.state import steps_done
from sgtm.words import counted

EVERY, REFRESH = 30.0, 1.0
"""Seconds between two lines about all runs, and between two looks at their logs."""


class Progress:
    """Counts in tokens times parameters, so that a run of a larger model is more of the whole.

    runs  all of the sweep; finished: those that were finished before
    """

    def __init__(self, runs: list[Run], finished: list[Run], console: Console | None = None):
        self.console = console or Console()
        self.runs, self.closed = runs, {run.name: run.config.train.steps for run in finished}  # steps of what has ended
        self.running: dict[str, Run] = {}
        self.unfinished = 0
        self.steps = {run.name: self.closed.get(run.name, steps_done(run.directory)) for run in runs}
        self.work = {run.name: _work_of_step(run) for run in runs}
        self.before = self._done()
        self.since: float | None = None
        self._looked = self._printed = time.monotonic()
        self.bars = _bars(self.console) if self.console.is_terminal else None

    def __enter__(self) -> Progress:
        if self.bars:
            self.all = self.bars.add_task(
                counted(len(self.runs), "run"), total=self._total(), completed=self.before, text=""
            )
            self.tasks: dict[str, rich.progress.TaskID] = {}
            self.bars.start()
        return self

    def __exit__(self, *error) -> None:
        if self.bars:
            self.bars.stop()

    def started(self, run: Run) -> None:
        self.running[run.name] = run
        if self.bars:
            self.tasks[run.name] = self.bars.add_task(run.name, total=run.config.train.steps, text="")
        else:
            suffix = f" from step {self.steps[run.name]}" if self.steps[run.name] else ""
            self.print(f"started {run.name}{suffix}")

    def ended(self, run: Run, done: bool, status: int) -> None:
        del self.running[run.name]
        self.steps[run.name] = steps_done(run.directory)
        self.closed[run.name] = self.steps[run.name]
        self.unfinished += not done
        if self.bars:
            self.bars.remove_task(self.tasks.pop(run.name))
        step = self.steps[run.name]
        what = (
            "finished" if done else f"stopped at step {step}:" if status in ENDED_EARLY else f"failed at step {step}:"
        )
        self.print(f"{what} {run.name} ({self._finished()} runs finished)")

    def update(self) -> None:
        """Read the logs and print the progress, every few seconds."""
        now = time.monotonic()
        if now - self._looked < REFRESH:
            return
        self._looked = now
        for name, run in self.running.items():
            self.steps[name] = steps_done(run.directory)
        if self.since is None and self._done() > self.before:
            self.before, self.since = self._done(), now
        if self.bars:
            self.bars.update(self.all, completed=self._done(), total=self._total(), text=self.remaining())
            for name, task in self.tasks.items():
                self.bars.update(task, completed=self.steps[name], text="")
        elif now - self._printed >= EVERY:
            self._printed = now
            share = self._done() / max(self._total(), 1)
            self.print(
                f"{self._finished()} runs finished, {len(self.running)} training, {share:.0%} of all steps; "
                f"{self.remaining()}"
            )

    def remaining(self) -> str:
        """At the speed since the first steps of this call; before them runs are starting."""
        done = self._done() - self.before
        if self.since is None or done <= 0:
            return "remaining time unknown"
        return f"about {duration((self._total() - self._done()) * (time.monotonic() - self.since) / done)} left"

    def print(self, text: str) -> None:
        (self.bars.console if self.bars else self.console).print(text, highlight=False, soft_wrap=True, markup=False)

    def _finished(self) -> str:
        return f"{len(self.closed) - self.unfinished} of {len(self.runs)}"

    def _done(self) -> int:
        return sum(self.steps[name] * work for name, work in self.work.items())

    def _total(self) -> int:
        """Work of all runs; of one that has ended, what it did."""
        return sum(self.closed.get(run.name, run.config.train.steps) * self.work[run.name] for run in self.runs)


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _work_of_step(run: Run) -> int:
    return run.config.train.tokens_per_step * sum(parameter_sizes(run.config).values())


def _bars(console: Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=20),
        rich.progress.TaskProgressColumn(),
        rich.progress.TextColumn("{task.fields[text]}"),
        console=console,
    )
