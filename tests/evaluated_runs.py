"""Run directories with a config and evaluations in training, of losses that fall as 1 / step."""

from __future__ import annotations

import json

from sgtm.config import load_config
from sgtm.config.load import save_config


def write_run(folder, name: str, evaluations: dict[int, dict], *options: str):
    """A run directory with these evaluations: {step: losses}."""
    run = folder / name
    run.mkdir()
    save_config(
        load_config("debug", [f"--runs={folder}", f"--name={name}", "--train.steps=100", *options]), run / "config.yaml"
    )
    lines = [{"kind": "eval", "step": step, "losses": losses} for step, losses in evaluations.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def evaluations(*steps: int, worse: float = 1.0) -> dict[int, dict]:
    full = {step: {"en": worse * (1 + 100 / step), "es": worse * (2 + 100 / step)} for step in steps}
    return {step: {"full": losses, "without es": {"en": losses["en"], "es": 6.0}} for step, losses in full.items()}
