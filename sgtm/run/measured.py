"""The losses of a run at one step: of `sgtm eval`, or of an evaluation in training."""

from __future__ import annotations

import json
from pathlib import Path

from sgtm.run.metrics import read_metrics

SUMMARY = "summary.json"


def read_summary(run: Path | str) -> dict:
    """`summary.json` of a run; empty where there is none. Raises ValueError for a damaged one."""
    file = Path(run) / SUMMARY
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); run `sgtm eval` again") from None


def measured_at(run: Path | str, step: int, in_training: int | None) -> dict | None:
    """What was measured after this step, or None: `losses`, `errors`, `measured`, `true_labels` as `summary.json` has
    them, `split`, `sequences` of each category (None: all), and `by`, the command that measured it.

    in_training  most sequences of each category in an evaluation of the training; None: no limit

    Raises ValueError for a damaged summary or log.
    """
    summary = read_summary(run)
    if summary.get("losses") and summary.get("steps") == step:
        return {
            **_fields(summary),
            "split": summary.get("split", "test"),
            "sequences": summary.get("sequences"),
            "by": "sgtm eval",
        }
    lines = [line for line in read_metrics(Path(run) / "metrics.jsonl") if line["kind"] == "eval"]
    at_step = [line for line in lines if line["step"] == step]
    return {**_fields(at_step[-1]), "split": "test", "sequences": in_training, "by": "sgtm train"} if at_step else None


def _fields(record: dict) -> dict:
    return {key: record.get(key, {}) for key in ("losses", "errors", "measured", "true_labels")}
