"""How far the runs of a sweep are: each new, begun or finished; bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import time
from pathlib import Path

import rich.progress
from rich.console import Console

from sgtm.config.load import load_run_config
from sgtm.config.reference import flat
from sgtm.config.schema import Config
from sgtm.data.store import Corpus
from sgtm.estimate.shapes import parameter_sizes
from sgtm.process.signals import ENDED_EARLY
from sgtm.run.checkpoint import finished, read_manifest
from sgtm.run.metrics import read_metrics
from sgtm.sweep.file import Run

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
        self._looked = self._said = time.monotonic()
        self.bars = _bars(self.console) if self.console.is_terminal else None

    def __enter__(self) -> Progress:
        if self.bars:
            self.all = self.bars.add_task(f"{len(self.runs)} runs", total=self._total(), completed=self.before, text="")
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
            at = f" from step {self.steps[run.name]}" if self.steps[run.name] else ""
            self.say(f"started {run.name}{at}")

    def ended(self, run: Run, done: bool, status: int) -> None:
        del self.running[run.name]
        self.steps[run.name] = steps_done(run.directory)
        self.closed[run.name] = self.steps[run.name]
        self.unfinished += not done
        if self.bars:
            self.bars.remove_task(self.tasks.pop(run.name))
        at = self.steps[run.name]
        what = "finished" if done else f"stopped at step {at}:" if status in ENDED_EARLY else f"failed at step {at}:"
        self.say(f"{what} {run.name} ({self._finished()} runs finished)")

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
        elif now - self._said >= EVERY:
            self._said = now
            share = self._done() / max(self._total(), 1)
            self.say(
                f"{self._finished()} runs finished, {len(self.running)} training, {share:.0%} of all steps; "
                f"{self.remaining()}"
            )

    def remaining(self) -> str:
        """At the speed since the first steps of this call; before them runs are starting."""
        done = self._done() - self.before
        if self.since is None or done <= 0:
            return "remaining time unknown"
        return f"about {duration((self._total() - self._done()) * (time.monotonic() - self.since) / done)} left"

    def say(self, text: str) -> None:
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


NEW, BEGUN, FINISHED = "new", "begun", "finished"
FREE = ("runs", "wandb.mode", "wandb.project", "wandb.entity")  # change nothing in the results
TAIL = 2**16


def state_of(run: Run, corpus: Corpus | None) -> str:
    """`new`, `begun`, or `finished`: trained to the last step and evaluated.

    Raises ValueError for a directory of a run with other settings or data, naming the keys.
    """
    directory = run.directory
    if not (directory / "config.yaml").is_file():
        return NEW
    changed = differences(load_run_config(directory), run.config)
    if changed:
        lines = "\n  ".join(changed)
        raise ValueError(
            f"{directory} holds a run with other settings:\n  {lines}\nrename the variant or the sweep, or delete that "
            f"directory"
        )
    newest = next(iter(finished(directory)), None)
    if newest and corpus and _corpus_of(newest) not in (None, corpus.fingerprint):
        raise ValueError(
            f"{directory} was trained on other data than {corpus.path} holds now; rename the sweep, or delete that "
            f"directory"
        )
    return FINISHED if final_losses(directory, run.config) else BEGUN


def differences(before: Config, now: Config) -> list[str]:
    """`key: before, now` for every key that differs."""
    old, new = (flat(config.spelled_out()) for config in (before, now))
    keys = [key for key in {**new, **old} if key not in FREE and old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)} in the directory, {new.get(key)} in the sweep" for key in keys]


def final_losses(directory: Path, config: Config) -> dict[str, dict[str, float | None]] | None:
    """Losses of the evaluation after the last step, or None where it has not been made; null for one not finite."""
    lines = read_metrics(directory / "metrics.jsonl")
    found = [line["losses"] for line in lines if line["kind"] == "eval" and line["step"] == config.train.steps]
    return found[-1] if found else None


def steps_done(directory: Path) -> int:
    """Steps that a run has logged so far, from the end of its log; 0 without one."""
    try:
        with (directory / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # half a line, at either end
            continue
    return 0


def _corpus_of(checkpoint: Path) -> str | None:
    """Fingerprint of the data; None where the manifest is damaged, which resuming deals with."""
    try:
        return read_manifest(checkpoint)["corpus"]
    except ValueError:
        return None
