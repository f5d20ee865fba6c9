"""Reading input: sources cut into blocks that worker processes turn into documents; here the text files.

The process that reads does only what must be done in order (decompress, find line ends, decode row groups); everything
else happens where a block's `records()` is called. Where a block ends depends on the input alone, never on the number
of workers. A block's error names the file and the line, row or byte.

JSON is in `json_records.py`, tables are in `tables.py`; `discover.py` finds the sources.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sgtm.data.compression import chunks

BLOCK_BYTES = 4 * 2**20
"""Of a block; also what is read of a file in order before the next block is handed over."""


class Record(NamedTuple):
    """path: of its file, as it was given. where: what an error message calls the record."""

    path: str
    where: str
    fields: dict[str, Any]


class SourceBlock(Protocol):
    """A piece of a source: picklable, a few megabytes."""

    @property
    def progress(self) -> int:
        """What it stands for, in the unit of `Source.size`."""

    def records(self) -> Iterator[Record]:
        """The records in order. Raises ValueError naming file and line of one that cannot be read."""


class Source(ABC):
    """Something that yields blocks."""

    @property
    @abstractmethod
    def size(self) -> int:
        """In bytes, for the progress bar."""

    @abstractmethod
    def fingerprint(self) -> Any:
        """What changes when the input changes; JSON."""

    @abstractmethod
    def blocks(self, columns: Sequence[str]) -> Iterator[SourceBlock]:
        """The source in blocks; `columns` are the fields that will be asked for."""


def shown(path: Path) -> str:
    """A path as messages have it: bytes of a name that are not UTF-8 as `\\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def file_fingerprint(path: Path) -> list:
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


@dataclass
class File(Source):
    """One file that is a source of its own."""

    file: Path

    @cached_property
    def size(self) -> int:
        return self.file.stat().st_size

    def fingerprint(self) -> Any:
        return file_fingerprint(self.file)


@dataclass(frozen=True)
class RecordBlock:
    """Records that only reading in order can tell apart."""

    read: tuple[Record, ...]
    progress: int

    def records(self) -> Iterator[Record]:
        yield from self.read


def in_blocks(file: Path, values: Iterable[tuple[int, Any, int, int]]) -> Iterator[SourceBlock]:
    """Blocks of the records of a file.

    values  line, fields, size in characters, and bytes of the file read so far, of each record

    Raises ValueError for one that is not an object.
    """
    path, name = file.as_posix(), shown(file)
    records, size, before, read = [], 0, 0, 0
    for line, fields, characters, read in values:
        if not isinstance(fields, dict):
            raise ValueError(f"{name}:{line}: expected a JSON object, got {type(fields).__name__}")
        records.append(Record(path, f"{name}:{line}", fields))
        size += characters
        if size >= BLOCK_BYTES:
            yield RecordBlock(tuple(records), read - before)
            records, size, before = [], 0, read
    if records:
        yield RecordBlock(tuple(records), read - before)


@dataclass
class TextFiles(Source):
    """One folder's text files: each is a document, its category the folder's name."""

    files: list[Path]

    @cached_property
    def size(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def fingerprint(self) -> Any:
        return [file_fingerprint(file) for file in self.files]

    def blocks(self, columns: Sequence[str]) -> Iterator[SourceBlock]:
        group, size = [], 0
        for file in self.files:
            group.append(file)
            size += file.stat().st_size
            if size >= BLOCK_BYTES:
                yield TextBlock(tuple(group), size)
                group, size = [], 0
        if group:
            yield TextBlock(tuple(group), size)


@dataclass(frozen=True)
class TextBlock:
    files: tuple[Path, ...]
    progress: int

    def records(self) -> Iterator[Record]:
        for file in self.files:
            name = shown(file)
            try:
                text = b"".join(data for data, _ in chunks(file)).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{name}: not UTF-8 at byte {error.start}: {error.reason}") from None
            yield Record(file.as_posix(), name, {"text": text, "category": file.absolute().parent.name})
