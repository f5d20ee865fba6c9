"""The files of an export: those that `sgtm_export.json` lists, of its sizes and hashes, and nothing else."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from sgtm.files import sha256_of
from sgtm.hf.card import RECORD

WRITTEN_NAMES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config)\.json|README\.md|"
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)
"""Of the files that an export may hold, besides its record."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def file_problems(folder: Path, record: dict) -> list[str]:
    """Files that are missing, too many, of another size or content, or no plain files."""
    problems, listed = [], record["files"]
    present = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    for name, path in present.items():
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            problems.append(f"{path}: a link to {path.readlink()}; its target may change")
        elif stat.S_ISDIR(mode):
            problems.append(f"{path}: a folder, which no export has")
        elif not stat.S_ISREG(mode):
            problems.append(f"{path}: not a plain file")
        elif name not in listed and name != RECORD:
            problems.append(f"{path}: {RECORD} does not list it ({path.stat().st_size:,} bytes)")
        elif not WRITTEN_NAMES.fullmatch(name) and name != RECORD:
            problems.append(f"{path}: no export has a file of this name ({path.stat().st_size:,} bytes)")
        elif name in TOKENIZER and not record["tokenizer"]:
            problems.append(f"{path}: {RECORD} says that there is no tokenizer")
    for name, entry in listed.items():
        path = folder / name
        if name not in present:
            problems.append(f"{path}: missing")
        elif path.is_file() and (size := path.stat().st_size) != entry["bytes"]:
            problems.append(f"{path}: {size:,} bytes, should be {entry['bytes']:,}")
        elif path.is_file() and (digest := sha256_of(path)) != entry["sha256"]:
            problems.append(f"{path}: SHA-256 is {digest[:16]}..., should be {entry['sha256'][:16]}...")
    return problems
