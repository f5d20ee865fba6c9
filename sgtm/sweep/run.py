"""`sgtm sweep`: check everything, train what is not finished here or as a SLURM job each, write the table."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from sgtm.data.store import Corpus
from sgtm.estimate.launch import Settled, Where, compose, settle
from sgtm.estimate.units import amount
from sgtm.process.signals import ENDED_EARLY
from sgtm.sweep.compare import check_adjacent, check_comparable, check_measured, check_ranks, open_corpora
from sgtm.sweep.file import Run, Sweep, read_sweep
from sgtm.sweep.progress import Progress
from sgtm.sweep.schedule import (
    Outcome,
    Room,
    Start,
    arguments_of,
    find_room,
    keep_threads,
    log_of,
    need,
    start_process,
    train_all,
)
from sgtm.sweep.state import FINISHED, NEW, state_of
from sgtm.sweep.table import print_table, read_rows, write_table
from sgtm.words import counted

WIDE = 200
"""Columns of the table where stdout is no terminal."""


def run_sweep(
    file: Path,
    *,
    jobs: int | None = None,
    threads: int | None = None,
    dry_run: bool = False,
    table: bool = False,
    slurm: tuple[int | None, int | None] | None = None,
    start: Start = start_process,
) -> int:
    """Exit status: 0, 1 where a run failed, 128 + the signal that stopped the sweep.

    jobs, threads  at once, and of each; None: as `find_room` finds
    dry_run        list the runs and start nothing
    table          write the table of what is finished, and start nothing
    slurm          (nodes, GPUs of each): submit every unfinished run there instead of training here
    Raises ValueError, before any run directory is made, for a file with mistakes, runs that cannot be compared, and a
    run directory of a run with other settings or data.
    """
    sweep, console = read_sweep(file), Console(width=None if sys.stdout.isatty() else WIDE)
    where = check_submission(sweep, *slurm) if slurm else None
    if where is None and not table:
        check_ranks(sweep, 1)
    corpora = open_corpora(sweep)
    check_comparable(sweep, corpora)
    check_adjacent(sweep, corpora)
    check_measured(sweep, corpora)
    states = {run.name: state_of(run, corpora[run.name]) for run in sweep.runs}
    pending = [run for run in sweep.runs if states[run.name] != FINISHED]
    if dry_run:
        _list(sweep, states, None if slurm else find_room(sweep, jobs, threads), console)
        return 0
    sweep.folder.mkdir(parents=True, exist_ok=True)
    if table:
        _write(sweep, corpora, console)
        return 0
    with _alone(sweep.folder):
        open_corpora(sweep, write=True)  # once, and not in several runs at a time
        if where:
            for run in pending:
                _print(console, submit(sweep, run, where))
            _print(console, f"{counted(len(pending), 'run')} to be trained; sgtm sweep {file} --table collects them")
            return 0
        outcome = _train(sweep, pending, find_room(sweep, jobs, threads), console, start)
        _write(sweep, open_corpora(sweep), console)
    return _report(sweep, outcome, console)


def _train(sweep: Sweep, pending: list[Run], room: Room, console: Console, start: Start) -> Outcome:
    keep_threads(sweep, room)
    threads = "" if room.threads is None else f", {counted(room.threads, 'thread')} each"
    done = [run for run in sweep.runs if run not in pending]
    finished = f"{len(done)} of {counted(len(sweep.runs), 'run')} finished before; " if done else ""
    _print(console, f"{sweep.folder}: {finished}training {len(pending)}, {room.jobs} at a time{threads}")
    with Progress(list(sweep.runs), done, console) as progress:
        return train_all(sweep, pending, room, progress, start)


def _write(sweep: Sweep, corpora: dict[str, Corpus | None], console: Console) -> None:
    from sgtm.sweep.figures import write_figures  # matplotlib takes a second to import

    rows = read_rows(sweep, corpora)
    write_table(sweep, rows)
    write_figures(sweep, rows)
    print_table(rows, console)
    _print(console, f"table: {sweep.folder / 'table.csv'}")


def _report(sweep: Sweep, outcome: Outcome, console: Console) -> int:
    for run, status in outcome.failed:
        ended = "was stopped before its last step" if status in ENDED_EARLY else f"ended with status {status}"
        ended = f"was ended by {signal.Signals(-status).name}" if status < 0 else ended
        _print(console, f"failed: {run.name} {ended}; log: {log_of(sweep, run)}")
    if outcome.stopped:
        note = "finished runs and checkpoints are kept"
        name = signal.Signals(outcome.stopped).name
        print(f"stopped by {name}; {note}; continue: sgtm sweep {sweep.file}", file=sys.stderr)
        return 128 + outcome.stopped
    return int(bool(outcome.failed))


def _list(sweep: Sweep, states: dict[str, str], room: Room | None, console: Console) -> None:
    for run in sweep.runs:
        train = run.config.train
        tokens = f"{train.steps:,} x {train.tokens_per_step:,} tokens"
        state = "" if states[run.name] == NEW else f", {states[run.name]}"
        _print(console, f"{run.name}: {tokens}, about {amount(need(run))}{state}")
    if room:
        threads = "" if room.threads is None else f", {counted(room.threads, 'thread')} each"
        _print(console, f"{counted(len(sweep.runs), 'run')} in {sweep.folder}, {room.jobs} at a time{threads}")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While this lasts no other process trains this sweep. Raises ValueError where one does."""
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{folder} is being trained by another sgtm sweep; wait for it") from None
        yield


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def check_submission(sweep: Sweep, nodes: int | None, gpus: int | None) -> Settled:
    """Where the jobs go. Raises ValueError where the options, launch/ or a run's ranks do not fit."""
    where = settle(Where("slurm", nodes, gpus))
    compose(where, [])
    check_ranks(sweep, where.nodes * where.gpus)
    return where


def submit(sweep: Sweep, run: Run, where: Settled) -> str:
    """Submit the run; returns sbatch's reply, or the id of its queued job. Raises ValueError if SLURM refuses."""
    name = f"{sweep.folder.name}.{run.name}"
    queued = _output(["squeue", "--noheader", "--me", "--name", name, "--format", "%i"]).split()
    if queued:
        return f"{run.name} is in the queue already: job {', '.join(queued)}"
    log = log_of(sweep, run).absolute()
    log.parent.mkdir(parents=True, exist_ok=True)
    environment, (sbatch, *command) = compose(where, arguments_of(sweep, run)[1:])
    words = [sbatch, "--job-name", name, "--output", str(log), *command]
    return f"{run.name}: {_output(words, environment).strip()}"


def _output(command: list[str], environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, env={**os.environ, **(environment or {})}, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(f"{command[0]} is not on the PATH: submit from a machine of the SLURM cluster") from None
    if done.returncode:
        raise ValueError(f"{command[0]} ended with status {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
