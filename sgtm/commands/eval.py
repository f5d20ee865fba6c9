"""`sgtm eval`."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path

from sgtm.commands.options import COUNT, DATA, Subcommands, finite


def add(commands: Subcommands) -> None:
    parser = commands.add("eval", run, "losses by category, full and with domains removed")
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run directory, e.g. runs/quickstart")
    parser.add_argument("--split", default="test", help="split of the prepared data (default: test)")
    parser.add_argument("--sequences", type=COUNT, metavar="N", help="sequences per category (default: all)")
    steer = "add S times the run's direction to every token of the full model and write summary-steer+S.json"
    parser.add_argument("--steer", type=finite, metavar="S", help=f"{steer}; default: steering.strength of the run")
    remove = "remove this set of domains too (repeat for more sets; always: each domain by itself, and all)"
    parser.add_argument("--remove", nargs="+", action="append", default=[], metavar="DOMAIN", help=remove)
    strength = "also with domains at a strength from 0, as without them, to 1, as in the full model (repeatable)"
    parser.add_argument(
        "--strength", nargs="+", action="append", type=strength_of, default=[], metavar="DOMAIN=S", help=strength
    )
    parser.add_argument("--data.path", dest="data_path", metavar="DIR", help=DATA)


def strength_of(text: str) -> tuple[str, float]:
    """The type of an option `DOMAIN=S`."""
    domain, equals, number = text.rpartition("=")
    if not equals or not domain:
        raise ArgumentTypeError(f"expected DOMAIN=S, such as bio=0.5, got {text!r}")
    value = finite(number)
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"expected a strength from 0 to 1, got {text!r}")
    return domain, value


def run(options) -> None:
    from sgtm.run.located import check_run

    config = check_run(options.run_dir, options.data_path, options.split)  # before anything heavy is imported
    from sgtm.report import print_summary
    from sgtm.report.baselines import with_shipped
    from sgtm.run.evaluate import evaluate_run, write_summary

    added = {"remove": options.remove} if options.remove else {}
    added |= {"strengths": [dict(pairs) for pairs in options.strength]} if options.strength else {}
    steer = {} if options.steer is None else {"steer": options.steer}
    name = [f"summary-steer{options.steer:+g}.json"] if steer else []
    evaluation = evaluate_run(
        options.run_dir, split=options.split, sequences=options.sequences, data=options.data_path, **steer, **added
    )
    summary = with_shipped(evaluation, config)
    try:
        write_summary(options.run_dir, summary, *name)
    finally:
        print_summary(summary)
