"""`sgtm eval`: the losses of a run; nothing heavy is imported before it is called."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

DATA = "data of the run, where they are not in their old place (default: data.path of the run)"


def add_eval_options(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run directory, e.g. runs/quickstart")
    parser.add_argument("--split", default="test", help="split of the prepared data (default: test)")
    parser.add_argument("--sequences", type=positive, metavar="N", help="sequences per category (default: all)")
    parser.add_argument("--data.path", dest="data_path", metavar="DIR", help=DATA)


def run_eval(options) -> None:
    from sgtm.config.load import load_run_config
    from sgtm.config.located import locate_data
    from sgtm.data.store import check_split, read_manifest

    config = load_run_config(options.run_dir)
    folder = Path(locate_data(config, options.run_dir, options.data_path).data.path)
    if folder.is_dir():  # mistakes come before anything heavy is imported
        check_split(folder, read_manifest(folder).splits, options.split)
    from sgtm.evaluate.run import evaluate_run, write_summary
    from sgtm.report import print_summary
    from sgtm.report.baselines import with_shipped

    found = evaluate_run(options.run_dir, split=options.split, sequences=options.sequences, data=options.data_path)
    summary = with_shipped(found, config)
    try:
        write_summary(options.run_dir, summary)
    finally:
        print_summary(summary)
