"""From blocks of records to blocks of tokens, in parallel.

Each block becomes one file, written under a temporary name and renamed, so that a finished block can be reused by a run
that resumes. What a file holds depends on its block, the rules and the tokenizer alone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from sgtm.data.plain_text import as_text, control_ids
from sgtm.data.readers import SourceBlock
from sgtm.data.rules import Document, Rules
from sgtm.data.store import DOCUMENT, SPAN, token_dtype
from sgtm.data.tokenizer import PIECE_CHARACTERS, can_be_cut, cut
from sgtm.files import replacing

Offsets = list[tuple[int, int]]
"""(start, end) of each token in characters of its document."""


class EncodedBlock(NamedTuple):
    """Tokens end to end; `DOCUMENT`, its split a position in `splits`; `SPAN`, its documents counted in the block.

    names: of documents, where the rules have a field for them. nul: documents with a NUL character; first_nul: where.
    """

    tokens: np.ndarray
    documents: np.ndarray
    spans: np.ndarray
    splits: np.ndarray
    empty: int
    dropped: int
    names: np.ndarray = np.empty(0, np.str_)
    nul: int = 0
    first_nul: str = ""

    def save(self, path: Path) -> None:
        with replacing(path) as file:
            np.savez(file, **self._asdict())

    @classmethod
    def load(cls, path: Path) -> EncodedBlock:
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in cls._fields}
        counts = {name: int(arrays[name]) for name in ("empty", "dropped", "nul")}
        return cls(**{**arrays, **counts, "first_nul": str(arrays["first_nul"])})


@dataclass
class Encoder:
    """Turns blocks into tokens. Picklable: a worker loads its own tokenizer.

    tokenizer_file  a tokenizer of text alone (`sgtm.data.plain_text`)
    """

    rules: Rules
    tokenizer_file: Path
    eos_id: int
    vocab_size: int
    shard_tokens: int

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name not in ("_tokenizer", "_controls")}

    def encode_to(self, path: Path, block: SourceBlock) -> None:
        """Encodes a block into a file.

        Raises ValueError naming the record for anything the rules refuse, and for text that yields a control id.
        """
        self.encode(block).save(path)

    def encode(self, block: SourceBlock) -> EncodedBlock:
        documents, wheres, empty, dropped = [], [], 0, 0
        for path, where, fields in block.records():
            document = self.rules.document(fields, path, where)
            if document is None:
                dropped += 1
            elif not document.text.strip():
                empty += 1
            else:
                documents.append(document)
                wheres.append(where)
        nul = [where for document, where in zip(documents, wheres, strict=True) if "\0" in document.text]
        return self._tokenize(documents, wheres)._replace(
            empty=empty,
            dropped=dropped,
            names=np.array([document.name for document in documents if document.name is not None], np.str_),
            nul=len(nul),
            first_nul=nul[0] if nul else "",
        )

    def _tokenize(self, documents: list[Document], wheres: list[str]) -> EncodedBlock:
        index, spans = np.zeros(len(documents), DOCUMENT), []
        categories, splits = list(self.rules.categories), sorted({document.split for document in documents})
        pieces = []
        for i, (document, (ids, offsets)) in enumerate(zip(documents, self._encoded(documents), strict=True)):
            length = len(ids) + 1
            if self._controls[ids].any():
                raise ValueError(f"{wheres[i]}: {self._control_in(document.text)}")
            if length > self.shard_tokens:
                raise ValueError(
                    f"{wheres[i]}: a document of {length} tokens is longer than a shard of {self.shard_tokens}; "
                    f"raise --shard-tokens to at least {length}, or cut the document"
                )
            pieces += [ids, np.array([self.eos_id], token_dtype(self.vocab_size))]
            split = splits.index(document.split)
            index[i] = (document.id, 0, length, 0, categories.index(document.category), split)
            if document.spans:
                spans += [(i, *span) for span in token_spans(document.spans, offsets, categories)]
        tokens = np.concatenate(pieces) if pieces else np.empty(0, token_dtype(self.vocab_size))
        return EncodedBlock(tokens, index, np.array(spans, SPAN), np.array(splits, dtype=np.str_), 0, 0)

    def _encoded(self, documents: list[Document]) -> Iterator[tuple[np.ndarray, Offsets]]:
        """Token ids of each document, and their offsets in characters where it has spans.

        Some documents at a time, and a long one in pieces where that is the same, for the sake of memory.
        """
        tokenizer, dtype = self._loaded(), token_dtype(self.vocab_size)
        size = PIECE_CHARACTERS if can_be_cut(tokenizer) else None
        parts: list[str] = []
        batch: list[tuple[np.ndarray | int, Offsets]] = []
        characters = 0
        for document in documents:
            if document.spans:  # offsets cost time, so they are asked for only where a span needs them
                encoding = tokenizer.encode(document.text, add_special_tokens=False)
                batch.append((np.array(encoding.ids, dtype), encoding.offsets))
            else:
                pieces = list(cut(document.text, size))
                parts += pieces
                batch.append((len(pieces), []))
            characters += len(document.text)
            if characters >= PIECE_CHARACTERS:
                yield from _joined(tokenizer, parts, batch, dtype)
                parts, batch, characters = [], [], 0
        yield from _joined(tokenizer, parts, batch, dtype)

    def _loaded(self) -> Tokenizer:
        if not hasattr(self, "_tokenizer"):
            self._tokenizer = as_text(Tokenizer.from_file(str(self.tokenizer_file)))
            self._controls = np.zeros(self.vocab_size, bool)
            self._controls[list(control_ids(self._tokenizer, self.eos_id))] = True
        return self._tokenizer

    def _control_in(self, text: str) -> str:
        """Describes the first control id that a text yields."""
        encoding = self._loaded().encode(text, add_special_tokens=False)
        index = next(index for index, i in enumerate(encoding.ids) if self._controls[i])
        start, end = encoding.offsets[index]
        i = encoding.ids[index]
        return (
            f"{text[start:end]!r:.80} at character {start} becomes {self._loaded().id_to_token(i)!r} (id {i}), a "
            f"control token, and the tokenizer has no other pieces for it; take it out of the text, or prepare with "
            f"another tokenizer"
        )


def _joined(
    tokenizer: Tokenizer, parts: list[str], batch: list[tuple[np.ndarray | int, Offsets]], dtype: np.dtype
) -> Iterator[tuple[np.ndarray, Offsets]]:
    """Encodes the parts of the documents of a batch; of each the ids, or how many parts it has, and its offsets."""
    ids: list[np.ndarray] = []
    long = sum(map(len, parts)) > 2 * PIECE_CHARACTERS  # then one by one
    for some in [[part] for part in parts] if long else [parts]:
        encodings = tokenizer.encode_batch_fast(some, add_special_tokens=False)
        ids += [np.array(encoding.ids, dtype) for encoding in encodings]
    used = 0
    for content, offsets in batch:
        if isinstance(content, int):
            yield np.concatenate(ids[used : used + content]), offsets
            used += content
        else:
            yield content, offsets


def token_spans(
    spans: tuple[tuple[int, int, str], ...], offsets: Offsets, categories: list[str]
) -> list[tuple[int, int, int]]:
    """(token start, token end, category) of spans given in characters: every token that overlaps a span is in it.

    offsets  (start, end) in characters of each token, ascending. A token on the border of two spans goes to the first.
    """
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    ranges, used = [], 0
    for start, end, category in spans:
        first = max(used, int(np.searchsorted(ends, start, side="right")))
        last = int(np.searchsorted(starts, end, side="left"))
        if last > first:
            ranges.append((first, last, categories.index(category)))
            used = last
    return ranges


def encode_blocks(
    encoder: Encoder, blocks: Iterator[SourceBlock], folder: Path, workers: int, advance: Callable[[int], None]
) -> int:
    """Encodes the blocks that `folder` does not hold yet; returns how many there are in all.

    advance  is told the input bytes done

    Raises the error of the first block that has one, and OSError where a worker process died.
    """
    count = 0
    pending: deque[tuple[int, Future]] = deque()
    with _Workers(workers) as pool:
        for count, block in enumerate(blocks, 1):
            path = block_file(folder, count - 1)
            if path.exists():
                advance(block.progress)
                continue
            if workers == 1:
                encoder.encode_to(path, block)
                advance(block.progress)
                continue
            pending.append((block.progress, pool.submit(encoder, path, block)))
            while len(pending) > 2 * workers:
                advance(_finish(pending))
        while pending:
            advance(_finish(pending))
    return count


def block_file(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.npz"


def _finish(pending: deque[tuple[int, Future]]) -> int:
    progress, future = pending.popleft()
    future.result()
    return progress


class _Workers:
    """A pool of fresh interpreters, started on demand; forks would copy the tokenizer's threads in an unknown state."""

    def __init__(self, workers: int):
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Workers:
        return self

    def submit(self, encoder: Encoder, path: Path, block: SourceBlock) -> Future:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, context, _start_worker, (encoder,))
        # A worker that starts now inherits the mask, so that Ctrl-C does not interrupt its imports.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(_work, path, block)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def __exit__(self, exception: type | None, *error) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if exception is BrokenProcessPool:  # found by a result, or when more work is handed over
            message = "a worker process died, perhaps for lack of memory; run the same command again, it resumes"
            raise OSError(message) from None


_encoder: Encoder
"""Of a worker process, whose first call is `_start_worker`."""


def _start_worker(encoder: Encoder) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is parallel enough
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    global _encoder
    _encoder = encoder
    # A worker blocks on its queue for ever when the parent is killed, unless it watches.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one
    parent.join()
    os._exit(1)


def _work(path: Path, block: SourceBlock) -> None:
    _encoder.encode_to(path, block)
