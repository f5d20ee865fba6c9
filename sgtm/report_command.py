"""`sgtm report`: the page of a run, and its compute ratios; nothing heavy is imported before it is called."""

from __future__ import annotations

import argparse
from pathlib import Path

BASELINE = (
    "unmasked or filtered run of the same model and data: adds compute ratios to it, by its evaluations in training "
    "(train.eval_every); of several runs, of different lengths, by the last evaluation of each"
)


def add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN")
    parser.add_argument("--baseline", type=Path, nargs="+", default=[], metavar="RUN", help=BASELINE)


def run_report(options) -> None:
    from sgtm.config.load import load_run_config

    load_run_config(options.run_dir)  # before anything heavy is imported
    from sgtm.evaluate.compute_ratio import compute_ratios
    from sgtm.report import print_ratios, write_report

    ratios = compute_ratios(options.run_dir, options.baseline) if options.baseline else None
    if ratios:
        print_ratios(ratios)
    print(write_report(options.run_dir, ratios))
