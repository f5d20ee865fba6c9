"""`sgtm quickstart`."""

from __future__ import annotations

from pathlib import Path

from sgtm.commands.options import OVERRIDES, Subcommands
from sgtm.process.signals import stoppable


def add(commands: Subcommands) -> None:
    about = "train, evaluate and report the quickstart preset"
    commands.add("quickstart", run, about, epilog=OVERRIDES).set_defaults(config="quickstart")
    commands.configured.add("quickstart")


def run(options) -> None:
    from sgtm.config import load_config
    from sgtm.run.usable import check_usable

    config = load_config(options.config, options.overrides)
    folder = Path(config.runs) / config.name
    overwrite = _is_quickstart(folder)
    check_usable(folder, resume=False, overwrite=overwrite)
    if overwrite:
        print(f"{folder} is replaced; to resume it instead: sgtm train {folder} --resume")

    from sgtm.report import print_summary, write_report
    from sgtm.report.baselines import with_shipped
    from sgtm.run.evaluate import evaluate_run, write_summary
    from sgtm.training.loop import train

    trained = train(config, overwrite=overwrite)
    with stoppable(f"{trained} is trained; continue: sgtm eval {trained}; sgtm report {trained}"):
        summary = with_shipped(evaluate_run(trained), config)
        try:
            write_summary(trained, summary)
        finally:
            print_summary(summary)
        print(f"report: {write_report(trained)}")


def _is_quickstart(run: Path) -> bool:
    """Whether this is an earlier quickstart, which the next one may replace; a run of another name is somebody's work.

    Read as text, so that a config of an older version counts too: top-level keys are not indented.
    """
    file = run / "config.yaml"
    return file.is_file() and "name: quickstart" in file.read_text("utf-8", "replace").splitlines()
