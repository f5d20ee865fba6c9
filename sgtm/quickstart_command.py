"""`sgtm quickstart`: trains, evaluates and reports; nothing heavy is imported before it is called."""

from __future__ import annotations

from pathlib import Path


def run_quickstart(options) -> None:
    from sgtm.config import load_config

    config = load_config(options.config, options.overrides)

    from sgtm.evaluate.run import evaluate_run, write_summary
    from sgtm.report import print_summary, write_report
    from sgtm.report.baselines import shipped_baselines
    from sgtm.train.loop import train

    run = train(config, overwrite=_is_quickstart(Path(config.runs) / config.name))
    summary = {**evaluate_run(run), "baselines": shipped_baselines(config)}
    write_summary(run, summary)
    page = write_report(run)
    print_summary(summary)
    print(f"report: {page}")


def _is_quickstart(run: Path) -> bool:
    """Whether this is an earlier quickstart, which the next one may replace; a run of another name is somebody's work.

    Read as text, so that a config of an older version counts too: top-level keys are not indented.
    """
    file = run / "config.yaml"
    return file.is_file() and "name: quickstart" in file.read_text("utf-8", "replace").splitlines()
