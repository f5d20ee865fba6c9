"""Reading back what a run has written.

A run may be young, killed or evaluated in training alone, so every piece may be missing; a piece that is there but
damaged is an error that names it. The one exception is the last line of `metrics.jsonl`, which a killed run leaves half
written.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sgtm.config import load_config
from sgtm.config.schema import Config
from sgtm.data.open import open_corpus
from sgtm.masking.channel import most_with_group
from sgtm.report.baselines import with_shipped
from sgtm.run.located import locate_data
from sgtm.run.measured import read_summary
from sgtm.run.metrics import read_metrics


@dataclass(frozen=True)
class RunRecord:
    """One run directory.

    config, config_text  the schema and the file as written, or None and "" where there is no `config.yaml`
    steps, evals         lines of `metrics.jsonl` by kind, in order of step; a step repeated after a resume counts once,
                         as it was last seen
    summary              `summary.json`, or what the last evaluation in training found where that is later or there is
                         no `summary.json` (`in_training`: sequences of each category, `summary_steps`: the steps of an
                         outdated `summary.json`); empty before any evaluation
    warnings             texts of the `warning` lines
    """

    run: Path
    config: Config | None
    config_text: str
    steps: list[dict]
    evals: list[dict]
    summary: dict
    warnings: list[str]

    @property
    def name(self) -> str:
        return self.summary.get("name") or (self.config.name if self.config else self.run.resolve().name)


def read_record(run: Path) -> RunRecord:
    """Everything a run directory holds about the run. Raises ValueError if it is none, or a file in it is damaged."""
    if not run.is_dir():
        raise ValueError(f"{run} is not a run directory; `sgtm train` makes one at <runs>/<name>")
    config_file = run / "config.yaml"
    has_config = config_file.is_file()
    config = load_config(str(config_file), []) if has_config else None
    lines = read_metrics(run / "metrics.jsonl")
    evals, summary = _last_of_each_step(lines, "eval"), read_summary(run)
    if evals and not (summary.get("losses") and summary.get("steps", evals[-1]["step"]) >= evals[-1]["step"]):
        summary = _in_training(run, config, evals[-1], summary)
    if config and summary.get("losses"):
        summary = {"retain_with_group": most_with_group(config.channels, config.tables), **summary}
    return RunRecord(
        run,
        config,
        config_file.read_text(encoding="utf-8") if has_config else "",
        _last_of_each_step(lines, "step"),
        evals,
        summary,
        [line["text"] for line in _last_of_each_step(lines, "warning")],
    )


def _in_training(run: Path, config: Config | None, line: dict, outdated: dict) -> dict:
    """What a `summary.json` would hold of an evaluation in training.

    line      of `metrics.jsonl`; one of an older version names no true labels, which then come from the corpus
    outdated  an earlier `summary.json`, or {}
    """
    earlier_fields = {
        key: outdated[key] for key in ("name", "true_labels", "parameters", "versions") if key in outdated
    }
    line_fields = {
        key: line[key] for key in ("losses", "true_labels", "measured", "errors", "difference_errors") if key in line
    }
    summary = {
        **earlier_fields,
        **line_fields,
        "output_norms": line.get("norms", {}),
        "steps": line["step"],
        "split": "test",
    }
    if "steps" in outdated:
        summary["summary_steps"] = outdated["steps"]
    if config is None:
        return {**summary, "in_training": None}
    if "true_labels" not in summary:
        with suppress(ValueError, OSError):
            summary["true_labels"] = dict(open_corpus(locate_data(config, run), "sizes", write=False).categories)
    summary |= {"of_steps": config.train.steps, "in_training": config.train.eval_limit or "all"}
    return with_shipped(summary, config)


def is_forgotten(true_label: str, domains: tuple[str, ...]) -> bool:
    """Whether removing these domains is meant to raise the loss of a category with this true label."""
    return true_label in {f"forget:{domain}" for domain in domains}


def _last_of_each_step(lines: list[dict], kind: str) -> list[dict]:
    by_step = {line["step"]: line for line in lines if line.get("kind") == kind}
    return [by_step[step] for step in sorted(by_step)]
