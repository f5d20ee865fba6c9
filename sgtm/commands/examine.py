"""`sgtm examine`."""

from __future__ import annotations

import sys
from pathlib import Path

from sgtm.commands.options import COUNT, DATA, Subcommands

MEASURES = ("calibrated", "recital", "membership", "quantised", "context", "probes", "guided")
"""As in sgtm/run/examine.py, which takes torch."""


def add(commands: Subcommands) -> None:
    parser = commands.add("examine", run, "what the safe models of a run still hold of each domain, by many measures")
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run directory, e.g. runs/quickstart")
    parser.add_argument("--against", type=Path, metavar="RUN", help="a run trained without the domains, as the control")
    about = "measures (default: all of %(choices)s)"
    parser.add_argument("--only", nargs="+", default=[], choices=MEASURES, metavar="MEASURE", help=about)
    parser.add_argument("--split", default="test", help="split whose losses are measured (default: test)")
    parser.add_argument(
        "--sequences",
        type=COUNT,
        metavar="N",
        help="sequences per category (default: all; of context 200, of probes 400)",
    )
    parser.add_argument(
        "--texts", type=Path, metavar="FILE", help="passages to recite, one a line (default: of training)"
    )
    parser.add_argument("--passages", type=COUNT, metavar="N", help="without --texts (default: up to 100)")
    parser.add_argument(
        "--fit-sequences",
        type=COUNT,
        metavar="N",
        help="sequences per category that `calibrated` is fitted to, which takes its time (default: 20 tokens for each "
        "of the vocabulary)",
    )
    parser.add_argument("--data.path", dest="data_path", metavar="DIR", help=DATA)


def run(options) -> None:
    from sgtm.run.located import check_run

    for folder in filter(None, (options.run_dir, options.against)):
        check_run(folder, options.data_path, options.split)  # before anything heavy is imported
    texts = _passages(options.texts) if options.texts else []
    from sgtm.report.examination import print_examination
    from sgtm.run.examine import examine_run, write_examination

    results = examine_run(
        options.run_dir,
        measures=options.only,
        control=options.against,
        split=options.split,
        sequences=options.sequences,
        texts=texts,
        passages=options.passages,
        fit_sequences=options.fit_sequences,
        data=options.data_path,
        log=lambda line: print(line, file=sys.stderr),
    )
    if dropped := write_examination(options.run_dir, results):
        print(f"removed from {options.run_dir}: {', '.join(dropped)}, of other weights", file=sys.stderr)
    print_examination(results)


def _passages(file: Path) -> list[str]:
    try:
        texts = list(filter(None, file.read_text("utf-8").splitlines()))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    if not texts:
        raise ValueError(f"{file} has no line of text: one passage a line is expected")
    return texts
