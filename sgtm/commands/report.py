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
    usage = "%(prog)s RUN [--baseline RUN [RUN ...]] [-h]"
    parser = commands.add("report", run, "write the HTML page and the figures of a run", usage=usage)
    parser.add_argument("run_dir", type=Path, metavar="RUN")
    parser.add_argument("--baseline", type=Path, nargs="+", default=[], metavar="RUN", help=BASELINE)


def run(options) -> None:
    from sgtm.config.load import load_run_config

    for folder in (options.run_dir, *options.baseline):
        load_run_config(folder)  # before anything heavy is imported
    from sgtm.report import compare, print_comparison, write_report

    comparison = compare(options.run_dir, options.baseline) if options.baseline else None
    if comparison:
        print_comparison(comparison)
    print(write_report(options.run_dir, comparison))
