"""`sgtm report`."""

from __future__ import annotations

from pathlib import Path

from sgtm.commands.options import Subcommands

BASELINE = (
    "unmasked and filtered runs of the same model and data: puts their losses beside this run's and adds compute "
    "ratios to them, by their evaluations in training (train.eval_every); runs that differ in their length alone make "
    "one curve, by the last evaluation of each"
)


def add(commands: Subcommands) -> None:
    usage = "%(prog)s RUN|SWEEP [--baseline RUN [RUN ...]] [--out DIR] [-h]"
    parser = commands.add("report", run, "write the HTML page and the figures of a run or a sweep", usage=usage)
    about = "run directory; folder of a sweep, or a file of rows such as its table.jsonl"
    parser.add_argument("path", type=Path, metavar="RUN|SWEEP", help=about)
    parser.add_argument("--baseline", type=Path, nargs="+", default=[], metavar="RUN", help=BASELINE)
    out = "folder of a sweep's page (default: report in its folder; NAME-report here for a file NAME.jsonl)"
    parser.add_argument("--out", type=Path, metavar="DIR", help=out)


def run(options) -> None:
    path: Path = options.path
    if path.is_file() or (path / "table.jsonl").is_file():
        _write_study(path, options)
    else:
        _write_run(path, options)


def _write_study(path: Path, options) -> None:
    if options.baseline:
        raise ValueError("--baseline belongs to the page of a run; a sweep has its baselines among its variants")
    from sgtm.sweep.study import read_study

    study = read_study(path)
    from sgtm.sweep.page import write_study

    default = path / "report" if path.is_dir() else Path(f"{path.stem}-report")
    print(write_study(study, options.out or default))


def _write_run(path: Path, options) -> None:
    if options.out:
        raise ValueError("--out is for the page of a sweep; that of a run is written into the run directory")
    from sgtm.config.load import load_run_config

    for folder in (path, *options.baseline):
        load_run_config(folder)  # before anything heavy is imported
    from sgtm.report import compare, print_comparison, write_report

    comparison = compare(path, options.baseline) if options.baseline else None
    if comparison:
        print_comparison(comparison)
    print(write_report(path, comparison))
