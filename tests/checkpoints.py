"""Checkpoints of a tiny run, put in place as training does, with a file of text for the weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tiny import tiny_config

from sgtm.run import checkpoint
from sgtm.run.saving import publish

CONFIG = tiny_config()


def manifest_of(folder: Path, corpus: str = "of the run") -> dict:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
    }
    return {"step": 1, "ranks": 1, "corpus": corpus, "config": checkpoint.resolved(CONFIG), "files": files}


def make(run: Path, *steps: int) -> list[Path]:
    """Whole checkpoints of these steps, published in this order."""
    for step in steps:
        temporary = run / "checkpoints" / f".tmp-{step}"
        temporary.mkdir(parents=True)
        (temporary / "weights").write_text(f"of step {step}")
        publish(temporary, run / f"checkpoints/step_{step:08d}", manifest_of(temporary), keep_last=9)
    return [run / f"checkpoints/step_{step:08d}" for step in steps]
