"""Writing a corpus: documents in order into shards, the index, and the manifest last.

The promise: the files depend on the documents and their order alone, and `Corpus.open` refuses the folder until
`finish` has returned (`tests/processes/test_prepare_resume.py` kills it at every stage).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sgtm.data.store import (
    DOCUMENT,
    DOCUMENTS,
    MANIFEST,
    SPAN,
    SPANS,
    TOKEN_NAMES,
    TOKENIZER,
    Count,
    Manifest,
    StoredFile,
    token_dtype,
)
from sgtm.files import naming, sha256_of, write_atomically


class CorpusWriter:
    """Appends documents to the shards of `path`, whose `tokenizer/tokenizer.json` is there already.

    A document never crosses shards; `add` raises ValueError for one longer than `shard_tokens`.
    """

    def __init__(self, path: Path, vocab_size: int, shard_tokens: int):
        self.path, self.vocab_size, self.shard_tokens = path, vocab_size, shard_tokens
        self._dtype = token_dtype(vocab_size)
        self._documents: list[np.ndarray] = []
        self._spans: list[np.ndarray] = []
        self._files: dict[str, StoredFile] = {}
        self._count = 0
        (path / "shards").mkdir(exist_ok=True)
        self._open_shard()

    def add(self, tokens: np.ndarray, documents: np.ndarray, spans: np.ndarray) -> None:
        """Appends documents whose tokens lie end to end in `tokens`.

        tokens     [sum of lengths]
        documents  `DOCUMENT` [n]; `shard` and `offset` are filled in here
        spans      `SPAN` [m]; `document` counts from the first of these documents
        """
        documents, ends = documents.copy(), np.cumsum(documents["length"], dtype=np.int64)
        if len(documents) and documents["length"].max() > self.shard_tokens:
            longest = int(documents["length"].max())
            raise ValueError(
                f"a document of {longest} tokens is longer than a shard; raise --shard-tokens to {longest}"
            )
        first = 0
        while first < len(documents):
            consumed = int(ends[first - 1]) if first else 0
            last = int(np.searchsorted(ends, consumed + self.shard_tokens - self._used, side="right"))
            if last == first:
                self._close_shard()
                self._open_shard()
                continue
            part = documents[first:last]
            part["shard"] = len(self._files)
            part["offset"] = self._used + ends[first:last] - consumed - part["length"]
            self._write(tokens[consumed : ends[last - 1]])
            first = last
        spans = spans.copy()
        spans["document"] += self._count
        self._count += len(documents)
        self._documents.append(documents)
        self._spans.append(spans)

    def finish(
        self,
        eos_id: int,
        categories: dict[str, str],
        splits: list[str],
        empty: int,
        dropped: int,
        notes: Sequence[str] = (),
    ) -> None:
        """Writes the index, then the manifest: from here on the corpus opens."""
        self._close_shard()
        documents = np.concatenate([np.empty(0, DOCUMENT), *self._documents])
        spans = np.concatenate([np.empty(0, SPAN), *self._spans])
        for name, array in ((DOCUMENTS, documents), (SPANS, np.sort(spans, order=["document", "start"]))):
            _save(self.path / name, array)
        names = (TOKEN_NAMES,) if (self.path / TOKEN_NAMES).is_file() else ()
        for name in (TOKENIZER, *names, DOCUMENTS, SPANS):
            self._files[name] = StoredFile(bytes=(self.path / name).stat().st_size, sha256=sha256_of(self.path / name))
        manifest = Manifest(
            vocab_size=self.vocab_size,
            eos_id=eos_id,
            shard_tokens=self.shard_tokens,
            categories=categories,
            splits=splits,
            counts=_counts(documents, list(categories), splits),
            empty=empty,
            dropped=dropped,
            notes=list(notes),
            files=self._files,
        )
        text = manifest.model_dump_json(indent=1, exclude=None if notes else {"notes"})
        write_atomically(self.path / MANIFEST, text + "\n")

    def _open_shard(self) -> None:
        self._name = f"shards/{len(self._files):05d}.bin"
        self._handle = (self.path / self._name).open("wb")
        self._hash = hashlib.sha256()
        self._used = 0

    def _write(self, tokens: np.ndarray) -> None:
        data = tokens.astype(self._dtype, copy=False).tobytes()
        with naming(self.path / self._name):
            self._handle.write(data)
        self._hash.update(data)
        self._used += len(tokens)

    def _close_shard(self) -> None:
        with naming(self.path / self._name), self._handle:
            _flush(self._handle)
        size = self._used * self._dtype.itemsize
        self._files[self._name] = StoredFile(bytes=size, sha256=self._hash.hexdigest())


def _save(path: Path, array: np.ndarray) -> None:
    """As `np.save`, whose error on a full disk has no reason."""
    with naming(path), path.open("wb") as handle:
        np.lib.format.write_array_header_1_0(handle, np.lib.format.header_data_from_array_1_0(array))
        handle.write(array.view(np.uint8).data)
        _flush(handle)


def _flush(handle: BinaryIO) -> None:
    handle.flush()
    os.fsync(handle.fileno())


def _counts(documents: np.ndarray, categories: list[str], splits: list[str]) -> dict[str, dict[str, Count]]:
    counts: dict[str, dict[str, Count]] = {}
    for s, split in enumerate(splits):
        lengths = [
            documents["length"][(documents["split"] == s) & (documents["category"] == c)]
            for c in range(len(categories))
        ]
        counts[split] = {
            category: Count(documents=len(length), tokens=int(length.sum(dtype=np.int64)))
            for category, length in zip(categories, lengths, strict=True)
            if len(length)
        }
    return counts
