"""State of a run directory: new, begun or finished, and whether it is of the same settings."""

from __future__ import annotations

import json
from pathlib import Path

from sgtm.config.load import load_run_config
from sgtm.config.reference import flat
from sgtm.config.schema import Config
from sgtm.data.store import Corpus
from sgtm.run.checkpoint import check_same_corpus, finished, read_manifest
from sgtm.run.metrics import read_metrics
from sgtm.sweep.file import Run

NEW, BEGUN, FINISHED = "new", "begun", "finished"
FREE = ("runs", "wandb.mode", "wandb.project", "wandb.entity")  # change nothing in the results
TAIL = 2**16


def state_of(run: Run, corpus: Corpus | None) -> str:
    """`new`, `begun`, or `finished`: trained to the last step and evaluated.

    Raises ValueError for a directory of a run with other settings, naming the keys, or of another corpus.
    """
    directory = run.directory
    if not (directory / "config.yaml").is_file():
        return NEW
    changed = differences(load_run_config(directory), run.config)
    if changed:
        lines = "\n  ".join(changed)
        raise ValueError(
            f"{directory} holds a run with other settings:\n  {lines}\nrename the variant or the sweep, or delete that "
            f"directory"
        )
    newest = next(iter(finished(directory)), None)
    manifest = _manifest_of(newest) if newest and corpus else None
    if manifest and corpus:
        otherwise = "rename the sweep, or delete that directory"
        check_same_corpus(directory, manifest, corpus.path, corpus.fingerprint, otherwise)
    return FINISHED if final_losses(directory, run.config) else BEGUN


def differences(before: Config, now: Config) -> list[str]:
    """`key: before, now` for every key that differs."""
    old, new = (flat(config.spelled_out()) for config in (before, now))
    keys = [key for key in {**new, **old} if key not in FREE and old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)} in the directory, {new.get(key)} in the sweep" for key in keys]


def final_losses(directory: Path, config: Config) -> dict[str, dict[str, float | None]] | None:
    """Losses of the evaluation after the last step, or None where it has not been made; null for one not finite."""
    lines = read_metrics(directory / "metrics.jsonl")
    evaluations = [line["losses"] for line in lines if line["kind"] == "eval" and line["step"] == config.train.steps]
    return evaluations[-1] if evaluations else None


def steps_done(directory: Path) -> int:
    """Steps that a run has logged so far, from the end of its log; 0 without one."""
    try:
        with (directory / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # half a line, at either end
            continue
    return 0


def _manifest_of(checkpoint: Path) -> dict | None:
    """None where it is damaged, which resuming deals with."""
    try:
        return read_manifest(checkpoint)
    except ValueError:
        return None
