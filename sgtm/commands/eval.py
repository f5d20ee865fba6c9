"""`sgtm eval`."""

from __future__ import annotations

from pathlib import Path

from sgtm.commands.options import COUNT, DATA, Subcommands


def add(commands: Subcommands) -> None:
    parser = commands.add("eval", run, "losses by category, full and with every subset of domains removed")
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run directory, e.g. runs/quickstart")
    parser.add_argument("--split", default="test", help="split of the prepared data (default: test)")
    parser.add_argument("--sequences", type=COUNT, metavar="N", help="sequences per category (default: all)")
    parser.add_argument("--data.path", dest="data_path", metavar="DIR", help=DATA)


def run(options) -> None:
    from sgtm.config.load import load_run_config
    from sgtm.data.store import check_split, read_manifest
    from sgtm.run.located import locate_data

    config = load_run_config(options.run_dir)
    folder = Path(locate_data(config, options.run_dir, options.data_path).data.path)
    if folder.is_dir():  # mistakes come before anything heavy is imported
        check_split(folder, read_manifest(folder).splits, options.split)
    from sgtm.report import print_summary
    from sgtm.report.baselines import with_shipped
    from sgtm.run.evaluate import evaluate_run, write_summary

    evaluation = evaluate_run(options.run_dir, split=options.split, sequences=options.sequences, data=options.data_path)
    summary = with_shipped(evaluation, config)
    try:
        write_summary(options.run_dir, summary)
    finally:
        print_summary(summary)
