"""What an export says of itself, held against the run: its record, its card, its configs and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig

from sgtm.audit.check import differing
from sgtm.config import Config
from sgtm.files import sha256_of
from sgtm.hf.card import card, record_of
from sgtm.hf.export import CARD, save_config
from sgtm.run.checkpoint import MANIFEST, checkpoints_dir, verify

WRITTEN = ("tokenizer", "dtype", "files", "versions")
"""Of the record: what follows from the written files and the versions that wrote them."""
CONFIGS = ("config.json", "generation_config.json")
WRITERS = ("transformers_version", "_from_model_config")


def checkpoint_problems(run: Path, record: dict) -> list[str]:
    """Whether the checkpoint in the record is the run's, and valid."""
    stored = record["checkpoint"]
    directory = checkpoints_dir(run) / stored["name"]
    if not (directory / MANIFEST).is_file():
        return [f"{directory}: there is no such checkpoint; the export is of another run, or its checkpoint is gone"]
    if (digest := sha256_of(directory / MANIFEST)) != stored["manifest_sha256"]:
        return [
            f"{directory / MANIFEST}: SHA-256 is {digest[:16]}..., the export was made from "
            f"{stored['manifest_sha256'][:16]}..."
        ]
    try:
        verify(directory)
    except ValueError as error:
        return [str(error)]
    return []


def fact_problems(
    folder: Path, record: dict, run: Path, config: Config, checkpoint: Path, made: PretrainedConfig
) -> list[str]:
    """Entries of the record that the run contradicts, and a card that is not the record's."""
    expected = record_of(run, config, checkpoint, made, record["removed"], record["reduced"], record["pruned"])
    stated = {key: value for key, value in record.items() if key not in WRITTEN}
    expected = json.loads(json.dumps({key: value for key, value in expected.items() if key not in WRITTEN}))
    losses = stated.get("losses"), expected["losses"]
    if not _same_measurement(*losses):  # the run was evaluated again, or for the first time
        expected["losses"] = losses[0]
    problems = differing("sgtm_export.json", stated, expected)
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        title = next((line[2:] for line in text.splitlines() if line.startswith("# ")), folder.name)
        right = card(record, title).splitlines()
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [*problems, f"{folder / CARD}: cannot be held against the record: {error!r}"]
    lines = text.splitlines()
    number = next((n for n, (a, b) in enumerate(zip(lines, right, strict=False), 1) if a != b), None)
    if lines != right:
        number = number or min(len(lines), len(right)) + 1
        problems.append(f"{folder / CARD}, line {number}: not what the record says")
    return problems


def _same_measurement(one: dict | None, other: dict | None) -> bool:
    keys = ("split", "sequences", "by")
    return one is not None and other is not None and all(one.get(key) == other.get(key) for key in keys)


def config_problems(folder: Path, made: PretrainedConfig, scratch: Path, unknown: Sequence[str] = ()) -> list[str]:
    """Keys of config.json and generation_config.json that an export would write otherwise.

    scratch  an empty folder
    unknown  keys that cannot be held against anything
    """
    save_config(made, scratch)
    problems = []
    for name in CONFIGS:
        try:
            actual, right = (json.loads((where / name).read_text(encoding="utf-8")) for where in (folder, scratch))
        except (OSError, ValueError) as error:
            problems.append(f"{folder / name}: cannot be read: {error}")
            continue
        ignored = {*WRITERS, *unknown}
        of_both = ({key: value for key, value in each.items() if key not in ignored} for each in (actual, right))
        problems += differing(str(folder / name), *of_both)
    return problems


def tokenizer_problems(folder: Path, scratch: Path) -> list[str]:
    """Tokenizer files that are not those of the run's corpus, which `scratch` has."""
    problems = []
    for name in ("tokenizer.json", "tokenizer_config.json"):
        try:
            actual, right = (json.loads((where / name).read_text(encoding="utf-8")) for where in (folder, scratch))
        except (OSError, ValueError) as error:
            problems.append(f"{folder / name}: cannot be read: {error}")
            continue
        problems += differing(str(folder / name), actual, right)
    return problems
