"""`sgtm_export.json`, as an audit takes it: of exactly the entries that sgtm/hf/card.py describes.

What follows from the run is held against it in sgtm/audit/facts.py. The other entries (files, versions, how the losses
were measured) can hold nothing but hashes, sizes, numbers and names of a few characters: a record has no room for
weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sgtm.hf.card import RECORD
from sgtm.hf.export import Dtype

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Version = Annotated[str, Field(pattern=r"^[0-9][0-9A-Za-z.+]{0,39}$")]
Count = Annotated[int, Field(ge=0)]


class _Entries(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _File(_Entries):
    bytes: Count
    sha256: Hash


class _Versions(_Entries):
    sgtm: Version
    torch: Version
    transformers: Version


class _Row(_Entries):
    category: str
    true_label: str | None
    tokens: Count | None
    full: float | None
    full_error: float | None
    this: float | None
    this_error: float | None


class _Losses(_Entries):
    split: str
    sequences: Count | None
    by: Literal["sgtm eval", "sgtm train"]
    rows: list[_Row]


class _Checkpoint(_Entries):
    name: str
    step: Count
    manifest_sha256: Hash


class _Record(_Entries):
    run: str
    recipe: str | None
    method: str
    removed: list[str]
    reduced: dict[str, float]
    independent_of: list[str]
    init_from: str | None
    pruned: bool
    how: dict[str, str]
    architecture: str
    architecture_because: str | None
    checkpoint: _Checkpoint
    corpus: str | None
    losses: _Losses | None
    unlearned: dict[str, Any] | None
    adapted: dict[str, Any] | None
    partition: dict[str, Any]
    versions: _Versions
    tokenizer: bool
    dtype: Dtype
    files: Annotated[dict[str, _File], Field(min_length=1)]


def read_export_record(folder: Path) -> dict:
    """`sgtm_export.json`. Raises ValueError where it is missing, or has other entries than the record of an export."""
    file = folder / RECORD
    try:
        text = file.read_text(encoding="utf-8")
        record = json.loads(text)
        _Record.model_validate(record)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: {folder} is no export, or one of sgtm before 0.2") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ": ".join(map(str, first["loc"])) or "as a whole"
        raise ValueError(f"{file} is not the record of an export: {where}: {first['msg']}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not the record of an export: {error}") from None
    if text != written(record, 1):
        raise ValueError(f"{file} is not written as sgtm writes it: keys are repeated, or text is hidden between them")
    return record


def written(content: Any, indent: int, **options: Any) -> str:
    """JSON as an export writes it: of a content one text alone, in which nothing can be hidden."""
    return json.dumps(content, indent=indent, **options) + "\n"
