"""The options of `sgtm sweep`; nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path

from sgtm.plan.command import COUNT


def add_sweep_options(sweep) -> None:
    sweep.description = (
        "Trains the runs of a sweep file (docs/sweep.md), several at a time, and compares them in one table. Called "
        "again it trains what is not finished."
    )
    sweep.add_argument("file", type=Path, metavar="FILE.yaml", help="sweep file, e.g. launch/recipes/*.sweep.yaml")
    sweep.add_argument("--jobs", type=COUNT, metavar="N", help="runs at a time (default: as many as there is room for)")
    sweep.add_argument("--threads", type=COUNT, metavar="N", help="of each run on a CPU (default: a fair share)")
    sweep.add_argument("--dry-run", action="store_true", help="list the runs, start nothing")
    sweep.add_argument("--table", action="store_true", help="write the table of the finished runs, start nothing")
    sweep.add_argument("--launcher", choices=("slurm",), help="submit a job for each run instead of training here")
    sweep.add_argument("--nodes", type=COUNT, metavar="N", help="slurm: nodes of each run (default: 1)")
    sweep.add_argument("--gpus", type=COUNT, metavar="N", help="slurm: GPUs of each node")


def run_sweep_command(options) -> int:
    if options.launcher is None and (options.nodes or options.gpus):
        raise ValueError("--nodes and --gpus belong to --launcher slurm; here each run is one process")
    if options.launcher and (options.jobs or options.threads):
        raise ValueError("--jobs and --threads are for runs on this machine; leave them out with --launcher slurm")

    from sgtm.sweep.run import run_sweep

    slurm = (options.nodes, options.gpus) if options.launcher else None
    return run_sweep(
        options.file,
        jobs=options.jobs,
        threads=options.threads,
        dry_run=options.dry_run,
        table=options.table,
        slurm=slurm,
    )
