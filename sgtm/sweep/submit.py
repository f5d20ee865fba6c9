"""Submitting the runs of a sweep to SLURM, a job each, through `launch/slurm.sbatch`."""

from __future__ import annotations

import os
import subprocess

from sgtm.estimate.launch import Settled, Where, compose, settle
from sgtm.sweep.compare import check_ranks
from sgtm.sweep.file import Run, Sweep
from sgtm.sweep.schedule import arguments_of, log_of


def check_submission(sweep: Sweep, nodes: int | None, gpus: int | None) -> Settled:
    """Where the jobs go. Raises ValueError where the options, launch/ or a run's ranks do not fit."""
    where = settle(Where("slurm", nodes, gpus))
    compose(where, [])
    check_ranks(sweep, where.nodes * where.gpus)
    return where


def submit(sweep: Sweep, run: Run, where: Settled) -> str:
    """Submit the run; returns sbatch's reply, or the id of its queued job. Raises ValueError if SLURM refuses."""
    name = f"{sweep.folder.name}.{run.name}"
    queued = _run(["squeue", "--noheader", "--me", "--name", name, "--format", "%i"]).split()
    if queued:
        return f"{run.name} is in the queue already: job {', '.join(queued)}"
    log = log_of(sweep, run).absolute()
    log.parent.mkdir(parents=True, exist_ok=True)
    environment, (sbatch, *command) = compose(where, arguments_of(sweep, run)[1:])
    words = [sbatch, "--job-name", name, "--output", str(log), *command]
    return f"{run.name}: {_run(words, environment).strip()}"


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, env={**os.environ, **(environment or {})}, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(f"{command[0]} is not on the PATH: submit from a machine of the SLURM cluster") from None
    if done.returncode:
        raise ValueError(f"{command[0]} ended with status {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
