"""`sgtm quickstart`: trains, evaluates and reports; nothing heavy is imported before it is called."""

from __future__ import annotations

from pathlib import Path

from sgtm.stopping import stoppable


def run_quickstart(options) -> None:
    from sgtm.config import load_config
    from sgtm.train.usable import check_usable

    config = load_config(options.config, options.overrides)
    folder = Path(config.runs) / config.name
    overwrite = _is_quickstart(folder)
    check_usable(folder, resume=False, overwrite=overwrite)

    from sgtm.evaluate.run import evaluate_run, write_summary
    from sgtm.report import print_summary, write_report
    from sgtm.report.baselines import with_shipped
    from sgtm.train.loop import train

    run = train(config, overwrite=overwrite)
    with stoppable(f"{run} is trained; go on: sgtm eval {run}; sgtm report {run}"):
        summary = with_shipped(evaluate_run(run), config)
        try:
            write_summary(run, summary)
        finally:
            print_summary(summary)
        print(f"report: {write_report(run)}")


def _is_quickstart(run: Path) -> bool:
    """Whether this is an earlier quickstart, which the next one may replace; a run of another name is somebody's work.

    Read as text, so that a config of an older version counts too: top-level keys are not indented.
    """
    file = run / "config.yaml"
    return file.is_file() and "name: quickstart" in file.read_text("utf-8", "replace").splitlines()
