"""Sweeps of the debug preset, and runs of them as training leaves them."""

from __future__ import annotations

import json
from pathlib import Path

from sgtm.config.load import save_config
from sgtm.sweep.file import Run, Sweep, read_sweep

STEPS = 4


def sweep_of(folder: Path, text: str) -> Sweep:
    """A sweep whose file has these lines; its runs have 4 steps of 512 tokens and lie in `folder`."""
    file = folder / "mine.yaml"
    file.write_text(f"base: debug\nruns: {folder / 'runs'}\nset: {{train.steps: {STEPS}}}\n{text}\n")
    return read_sweep(file)


def step(number: int, loss: float | None = 5.0) -> dict:
    return {"kind": "step", "step": number, "loss": loss}


def evaluation(number: int, losses: dict) -> dict:
    return {"kind": "eval", "step": number, "losses": losses}


def write_run(run: Run, *lines: dict) -> None:
    """Its directory, with a config and these lines in the log."""
    run.directory.mkdir(parents=True, exist_ok=True)
    save_config(run.config, run.directory / "config.yaml")
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
