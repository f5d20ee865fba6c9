"""The corpus on disk: memory-mapped token shards, a document index, and a manifest that is written last.

A corpus is a folder:

    manifest.json             what is here, with the size and SHA-256 of every other file
    tokenizer/tokenizer.json  the tokenizer of the tokens; where it was loaded and not trained, also
                              tokenizer_config.json, the names of its control tokens
    shards/00000.bin, ...     token ids, little-endian uint16 (uint32 for a vocabulary above 65,536), end to end
    documents.npy             one `DOCUMENT` record per document
    spans.npy                 one `SPAN` record per labelled stretch inside a document; usually empty

The promise: what `Corpus.open` returns is what `prepare` finished writing. No manifest, another format, a file that is
missing, cut short or changed, or an index that points outside its shard is a ValueError that names the file
(`tests/unit/test_data_store.py` damages each).
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from sgtm.files import sha256_of
from sgtm.masking.labels import LabelSpace
from sgtm.process.names import did_you_mean, look_alike, nearest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = 1
MANIFEST, TOKENIZER, DOCUMENTS, SPANS = "manifest.json", "tokenizer/tokenizer.json", "documents.npy", "spans.npy"
TOKEN_NAMES = "tokenizer/tokenizer_config.json"
LOCK = ".lock"
"""The first thing that `prepare` writes into a folder."""

# id: stable 64-bit hash of the text, what label draws depend on. offset, length: in tokens. category and split:
# positions in the manifest's lists. The true label is the category's, so it is stored once, in the manifest.
DOCUMENT = np.dtype(
    [("id", "<u8"), ("offset", "<i8"), ("length", "<i4"), ("shard", "<i4"), ("category", "<i2"), ("split", "<i2")]
)
# document: position in the index. start, end: tokens within the document.
SPAN = np.dtype([("document", "<i8"), ("start", "<i4"), ("end", "<i4"), ("category", "<i2")])


class StoredFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    bytes: int
    sha256: str


class Count(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    documents: int
    tokens: int


class Manifest(BaseModel):
    """Everything about a corpus but its tokens. `categories` maps each category to the name of its true label."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int = FORMAT
    vocab_size: int
    eos_id: int
    shard_tokens: int
    categories: dict[str, str]
    splits: list[str]
    counts: dict[str, dict[str, Count]]
    """By split and category."""
    empty: int
    """Documents skipped because they had no text."""
    dropped: int
    """Documents left out because the rules map their category to `drop`."""
    notes: list[str] = []
    """What reading found that is likely a mistake; not in the file where there is nothing."""
    files: dict[str, StoredFile]

    @property
    def shards(self) -> list[str]:
        return sorted(name for name in self.files if name.startswith("shards/"))

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.vocab_size)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every token id."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


class Corpus:
    """A prepared corpus, opened for reading.

    documents   `DOCUMENT` [documents], memory-mapped
    spans       `SPAN` [spans], sorted by document and start
    """

    def __init__(self, path: Path, manifest: Manifest, documents: np.ndarray, spans: np.ndarray):
        self.path, self.manifest, self.documents, self.spans = path, manifest, documents, spans
        self._shards: dict[int, np.ndarray] = {}

    @classmethod
    def open(cls, path: str | Path, verify: Literal["hashes", "sizes"] = "hashes") -> Corpus:
        """Opens a folder written by `prepare`.

        verify  `hashes` reads every file once (about 1 GB/s and thread); `sizes` only compares file sizes, for ranks
                whose neighbour has checked the hashes already

        Raises ValueError naming the file when anything is missing, damaged or of another format.
        """
        path = Path(path)
        manifest = read_manifest(path)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda item: _check_file(path / item[0], item[1], verify), manifest.files.items()))
        documents, spans = _load_index(path / DOCUMENTS, DOCUMENT), _load_index(path / SPANS, SPAN)
        _check_index(path, manifest, documents, spans)
        return cls(path, manifest, documents, spans)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, which holds that of every file: equal for equal corpora."""
        return sha256_of(self.path / MANIFEST)

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    @property
    def eos_id(self) -> int:
        return self.manifest.eos_id

    @property
    def categories(self) -> dict[str, str]:
        """Name of the true label of each category."""
        return self.manifest.categories

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.path / TOKENIZER))

    @cached_property
    def token_names(self) -> dict[str, str]:
        """Control tokens by role, such as `pad_token`, as the folder of the tokenizer named them; else empty."""
        from sgtm.data.tokenizer import named_tokens

        return named_tokens((self.path / TOKEN_NAMES).parent) if TOKEN_NAMES in self.manifest.files else {}

    def tokens(self, document: int, start: int = 0, end: int | None = None) -> np.ndarray:
        """Token ids `start:end` of a document: a view of the shard, uint16 or uint32. The last one is the EOS."""
        record = self.documents[document]
        offset, length = int(record["offset"]), int(record["length"])
        return self._shard(int(record["shard"]))[offset + start : offset + (length if end is None else end)]

    def select(self, split: str, category: str | None = None) -> np.ndarray:
        """int64 positions of a split's documents (of one category). Raises ValueError that lists the known names."""
        check_split(self.path, self.manifest.splits, split)
        chosen = self.documents["split"] == self.manifest.splits.index(split)
        if category is not None:
            if category not in self.categories:
                slip, known = did_you_mean(category, self.categories), ", ".join(self.categories)
                raise ValueError(f"{self.path} has no category {category!r}{slip}; its categories are {known}")
            chosen &= self.documents["category"] == list(self.categories).index(category)
        return np.flatnonzero(chosen)

    def label_of_category(self, space: LabelSpace) -> np.ndarray:
        """int64 [categories]: index of each category's true label. Raises ValueError for one that `space` lacks."""
        foreign = {label for label in self.categories.values() if label not in space.labels}
        if foreign:
            unused = [domain for domain in space.domains if f"forget:{domain}" not in self.categories.values()]
            labelled = ", ".join(f"{label}{_slip_of(label, unused, space)}" for label in sorted(foreign))
            raise ValueError(
                f"{self.path} has documents labelled {labelled}, but masking.domains is "
                f"{list(space.domains)}; add the missing domains, or prepare the data with other labels"
            )
        return np.array([space.label(label) for label in self.categories.values()], np.int64)

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._shards:
            self._shards[number] = np.memmap(self.path / self.manifest.shards[number], self.manifest.dtype, mode="r")
        return self._shards[number]


def _slip_of(label: str, unused: list[str], space: LabelSpace) -> str:
    """The domain of the config without documents that this label of the corpus may be meant by."""
    domain = label.removeprefix("forget:")
    if note := look_alike(label, space.labels):
        return note
    slip = nearest(domain, unused) if domain != label else None
    return f" and none labelled forget:{slip} (masking.domains: did you mean {domain}?)" if slip else ""


def check_split(path: Path, splits: list[str], split: str) -> None:
    """Raises ValueError where the corpus at `path` has no split of this name, with those that it has."""
    if split not in splits:
        slip, known = did_you_mean(split, splits), ", ".join(splits)
        raise ValueError(f"{path} has no split {split!r}{slip}; its splits are {known}")


def read_manifest(path: Path) -> Manifest:
    """The manifest of a corpus; no other file of it is read. Raises ValueError as `Corpus.open`."""
    if path.is_file():
        raise ValueError(
            f"data.path {path} is a file; it takes a folder written by: sgtm prepare {path} --rules FILE --out FOLDER"
        )
    if not path.is_dir():
        raise ValueError(f"no corpus at {path}: the folder does not exist; write it with `sgtm prepare`")
    if not (path / MANIFEST).is_file():
        if (path / LOCK).exists():
            raise ValueError(
                f"the corpus {path} is not finished: `sgtm prepare` was interrupted or ended with an error; run the "
                f"same command again to resume: sgtm prepare DATA... --rules FILE --out {path}"
            )
        raise ValueError(
            f"{path} is not a corpus (no {MANIFEST} in it); `sgtm prepare DATA... --rules FILE --out FOLDER` makes one"
        )
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version = content["format"]
        if version == FORMAT:
            return Manifest.model_validate(content)
    except (ValidationError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / MANIFEST} is damaged ({error}); prepare the corpus again") from None
    raise ValueError(
        f"{path / MANIFEST} has format {version}, this version reads format {FORMAT}; prepare the corpus again"
    )


def _check_file(path: Path, stored: StoredFile, verify: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing; prepare the corpus again")
    size = path.stat().st_size
    if size != stored.bytes:
        raise ValueError(f"{path} has {size} bytes instead of {stored.bytes}; copy or prepare the corpus again")
    if verify == "hashes" and (digest := sha256_of(path)) != stored.sha256:
        raise ValueError(
            f"{path} was changed: its SHA-256 is {digest[:16]}... instead of {stored.sha256[:16]}...; "
            f"copy or prepare the corpus again"
        )


def _load_index(path: Path, dtype: np.dtype) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); prepare the corpus again") from None
    if array.dtype != dtype or array.ndim != 1:
        raise ValueError(f"{path} holds {array.dtype}, expected {dtype}; prepare the corpus again")
    return array


def _check_index(path: Path, manifest: Manifest, documents: np.ndarray, spans: np.ndarray) -> None:
    """Raises ValueError for a record that points outside its shard, document, category or split."""
    sizes = np.array([manifest.files[name].bytes // manifest.dtype.itemsize for name in manifest.shards], np.int64)
    shard = np.clip(documents["shard"], 0, max(len(sizes) - 1, 0))
    inside = (documents["shard"] == shard) & (documents["offset"] >= 0) & (documents["length"] > 0)
    inside &= documents["offset"] + documents["length"] <= (sizes[shard] if len(sizes) else 0)
    for column, names in (("category", manifest.categories), ("split", manifest.splits)):
        inside &= (documents[column] >= 0) & (documents[column] < len(names))
    counted = sum(count.documents for by_category in manifest.counts.values() for count in by_category.values())
    if len(documents) != counted or not inside.all():
        raise ValueError(f"{path / DOCUMENTS} does not fit the shards and the manifest; prepare the corpus again")
    document = np.clip(spans["document"], 0, max(len(documents) - 1, 0))
    inside = (spans["document"] == document) & (spans["start"] >= 0) & (spans["start"] < spans["end"])
    inside &= (spans["end"] <= documents["length"][document]) & (spans["category"] >= 0)
    if not (inside & (spans["category"] < len(manifest.categories))).all():
        raise ValueError(f"{path / SPANS} points outside its documents; prepare the corpus again")
