"""`sgtm sweep`."""

from __future__ import annotations

from pathlib import Path

from sgtm.commands.options import COUNT, Subcommands


def add(commands: Subcommands) -> None:
    parser = commands.add("sweep", run, "train many runs and compare them in one table")
    parser.description = (
        "Trains the runs of a sweep file (docs/sweep.md), several at a time, and compares them in one table. Called "
        "again it trains what is not finished."
    )
    parser.add_argument("file", type=Path, metavar="FILE.yaml", help="sweep file, e.g. launch/recipes/*.sweep.yaml")
    jobs = "runs at a time (default: as many as there is room for)"
    parser.add_argument("--jobs", type=COUNT, metavar="N", help=jobs)
    parser.add_argument("--threads", type=COUNT, metavar="N", help="of each run on a CPU (default: a fair share)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, start nothing")
    parser.add_argument("--table", action="store_true", help="write the table of the finished runs, start nothing")
    parser.add_argument("--launcher", choices=("slurm",), help="submit a job for each run instead of training here")
    parser.add_argument("--nodes", type=COUNT, metavar="N", help="slurm: nodes of each run (default: 1)")
    parser.add_argument("--gpus", type=COUNT, metavar="N", help="slurm: GPUs of each node")


def run(options) -> int:
    if options.launcher is None and (options.nodes or options.gpus):
        raise ValueError("--nodes and --gpus belong to --launcher slurm; here each run is one process")
    if options.launcher and (options.jobs or options.threads):
        raise ValueError("--jobs and --threads are for runs on this machine; leave them out with --launcher slurm")

    from sgtm.sweep.file import read_sweep

    read_sweep(options.file)  # before anything heavy is imported
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
