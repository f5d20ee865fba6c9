"""What an export says of itself, held against the run: its record, its card, its configs and its tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig

from sgtm.audit.check import differing
from sgtm.audit.files import TOKENIZER
from sgtm.audit.record import written
from sgtm.config import Config
from sgtm.files import sha256_of
from sgtm.hf.card import RECORD, card, record_of
from sgtm.hf.export import CARD, save_config
from sgtm.run.checkpoint import MANIFEST, checkpoints_dir, verify

WRITTEN = ("tokenizer", "dtype", "files", "versions")
"""Of the record: what follows from the written files and the versions that wrote them."""
CONFIGS = ("config.json", "generation_config.json")
TITLE = re.compile(r"[\w.-]{1,100}")
HIDDEN = "not written as an export writes it: keys are repeated, or text is hidden between them"


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
    losses, measured = stated["losses"], expected["losses"]
    problems = []
    if measured and not losses:
        problems.append(
            f"{folder / RECORD}: losses are left out, which the run has; if it was evaluated since, export it again"
        )
    if not _same_measurement(losses, measured):  # the run was evaluated again, or not at all
        expected["losses"] = losses
    problems += differing("sgtm_export.json", stated, expected)
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        title = next((line[2:] for line in text.splitlines() if line.startswith("# ")), folder.name)
        if not TITLE.fullmatch(title):
            problems.append(f"{folder / CARD}: its title is {title!r}, which is no name of a folder")
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


def config_problems(
    folder: Path, record: dict, made: PretrainedConfig, scratch: Path, unknown: Sequence[str] = ()
) -> list[str]:
    """Keys of config.json and generation_config.json that an export would write otherwise, and other text in them.

    scratch  an empty folder
    unknown  keys that cannot be held against anything
    """
    save_config(made, scratch)
    problems = []
    for name in CONFIGS:
        try:
            actual, right, plain = _both(folder, scratch, name)
        except (OSError, ValueError) as error:
            problems.append(f"{folder / name}: cannot be read: {error}")
            continue
        right["transformers_version"] = record["versions"]["transformers"]
        ignored = {*unknown, "_from_model_config"}  # not of every version of transformers
        of_both = ({key: value for key, value in each.items() if key not in ignored} for each in (actual, right))
        problems += differing(str(folder / name), *of_both)
        if not isinstance(actual.get("_from_model_config", True), bool):
            problems.append(f"{folder / name}: _from_model_config is neither true nor false")
        problems += [] if plain else [f"{folder / name}: {HIDDEN}"]
    return problems


def _both(folder: Path, scratch: Path, name: str) -> tuple[dict, dict, bool]:
    """A JSON file of the export, the one that an export would write, and whether the first has no text besides."""
    text, right = ((where / name).read_text(encoding="utf-8") for where in (folder, scratch))
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it has no keys")
    options = [{"ensure_ascii": ascii, "sort_keys": sort} for ascii in (True, False) for sort in (True, False)]
    forms = [written(content, 2, **each) for each in options]
    return content, json.loads(right), text in (right, *forms) or text + "\n" in forms


def tokenizer_problems(folder: Path, scratch: Path) -> list[str]:
    """Tokenizer files that are not those of the run's corpus, which `scratch` has."""
    problems = []
    for name in TOKENIZER:
        try:
            actual, right, plain = _both(folder, scratch, name)
        except (OSError, ValueError) as error:
            problems.append(f"{folder / name}: cannot be read: {error}")
            continue
        problems += differing(str(folder / name), actual, right)
        problems += [] if plain else [f"{folder / name}: {HIDDEN}"]
    return problems
