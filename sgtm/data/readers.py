"""Reading input: folders and files of four formats, cut into blocks that worker processes turn into documents.

The process that reads does only what must be done in order (decompress, find line ends, decode row groups); everything
else happens where a block's `records()` is called. Where a block ends depends on the input alone, never on the number
of workers. A block's error names the file and the line, row or byte.
"""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

BLOCK_BYTES = 4 * 2**20
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
SUFFIXES = (".txt", *JSONL, ".parquet")


class Record(NamedTuple):
    """path: of its file, as it was given. where: what an error message calls the record."""

    path: str
    where: str
    fields: dict[str, Any]


class Block(Protocol):
    """A piece of a source: picklable, a few megabytes. progress: what it stands for, in the unit of `Source.size`."""

    progress: int

    def records(self) -> Iterator[Record]:
        """The records in order. Raises ValueError naming the place of one that cannot be read."""


class Source(ABC):
    """Something that yields blocks. size: in bytes, for the progress bar."""

    size: int

    @abstractmethod
    def fingerprint(self) -> Any:
        """What changes when the input changes; JSON."""

    @abstractmethod
    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        """The source in blocks; `columns` are the fields that will be asked for."""


def open_sources(paths: Iterable[str | Path]) -> list[Source]:
    """Finds what can be read under these files and folders, in sorted order.

    Raises ValueError for a path that does not exist, a file of unknown format, or a folder with nothing readable.
    """
    sources: list[Source] = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"no such file or folder: {path}")
        found = list(_discover(path))
        if not found:
            raise ValueError(
                f"nothing to read in {path}: expected {', '.join(SUFFIXES)} or a saved Hugging Face dataset"
            )
        sources += found
    return sources


def _discover(path: Path) -> Iterator[Source]:
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            for split in _splits(path / "dataset_dict.json"):
                yield SavedDataset(path / split, split)
        elif (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            yield SavedDataset(path, None)
        else:
            texts = sorted(child for child in path.iterdir() if child.is_file() and child.suffix == ".txt")
            if texts:
                yield TextFiles(texts)
            for child in sorted(path.iterdir()):
                if child.is_dir() or (child.name.endswith(SUFFIXES) and child not in texts):
                    yield from _discover(child)
    elif path.suffix == ".txt":
        yield TextFiles([path])
    elif path.name.endswith(JSONL):
        yield JsonLines(path)
    elif path.suffix == ".parquet":
        yield Parquet(path)
    else:
        raise ValueError(f"cannot read {path}: expected {', '.join(SUFFIXES)} or a saved Hugging Face dataset")


def _splits(file: Path) -> list[str]:
    """The splits of a saved `DatasetDict`, each in a folder of its name."""
    try:
        splits = json.loads(file.read_text(encoding="utf-8"))["splits"]
        if isinstance(splits, list) and all(isinstance(split, str) for split in splits):
            return splits
        problem = f"splits is {splits!r}"
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise ValueError(f'{file} is damaged ({problem}); expected {{"splits": ["train", ...]}}; save the dataset again')


def _file_fingerprint(path: Path) -> list:
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


@dataclass
class TextFiles(Source):
    """One folder's text files: each is a document, its category the folder's name."""

    files: list[Path]

    def __post_init__(self):
        self.size = sum(file.stat().st_size for file in self.files)

    def fingerprint(self) -> Any:
        return [_file_fingerprint(file) for file in self.files]

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
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
            try:
                text = file.read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: not UTF-8 at byte {error.start}: {error.reason}") from None
            yield Record(file.as_posix(), str(file), {"text": text, "category": file.absolute().parent.name})


@dataclass
class JsonLines(Source):
    """One JSON object per line; plain, gzip, xz or Zstandard. Blank lines are skipped."""

    file: Path

    def __post_init__(self):
        self.size = self.file.stat().st_size

    def fingerprint(self) -> Any:
        return _file_fingerprint(self.file)

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        first, read = 1, 0
        rest = b""
        with self.file.open("rb") as handle:
            for chunk in _decompressed(handle, self.file):
                rest += chunk
                while end := rest.find(b"\n", BLOCK_BYTES - 1) + 1:
                    yield LineBlock(self.file, first, rest[:end], handle.tell() - read)
                    first, read, rest = first + rest.count(b"\n", 0, end), handle.tell(), rest[end:]
            yield LineBlock(self.file, first, rest, handle.tell() - read)


@dataclass(frozen=True)
class LineBlock:
    file: Path
    first_line: int
    data: bytes
    progress: int

    def records(self) -> Iterator[Record]:
        for number, line in enumerate(self.data.split(b"\n"), self.first_line):
            where = f"{self.file}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                record = json.loads(text) if text else None
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 at byte {error.start} of the line: {error.reason}") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error.msg} at character {error.pos}") from None
            except RecursionError:
                raise ValueError(f"{where}: not JSON that can be read: nested too deeply") from None
            except ValueError as error:  # a number of more digits than Python converts
                raise ValueError(f"{where}: not JSON that can be read: {error}") from None
            if not text:
                continue
            if not isinstance(record, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
            yield Record(self.file.as_posix(), where, record)


def _decompressed(handle, path: Path) -> Iterator[bytes]:
    """The contents in chunks. Raises ValueError for a file that is damaged or ends too early."""
    try:
        if path.suffix == ".zst":
            yield from _zstandard(handle, path)
            return
        opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, lambda plain: plain)(handle)
        while chunk := opened.read(2**20):
            yield chunk
    except EOFError:
        raise ValueError(f"{path} is truncated: the compressed data end too early; fetch it again") from None
    except (lzma.LZMAError, zlib.error, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _zstandard(handle, path: Path) -> Iterator[bytes]:
    """Every frame of the file; unlike the library's stream reader, it notices a last frame that is cut short."""
    import zstandard

    decompressor, pending = zstandard.ZstdDecompressor().decompressobj(), b""
    started = False
    try:
        while data := pending or handle.read(2**18):
            started = True
            yield decompressor.decompress(data)
            pending = decompressor.unused_data if decompressor.eof else b""
            if decompressor.eof:
                decompressor, started = zstandard.ZstdDecompressor().decompressobj(), False
    except zstandard.ZstdError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if started:
        raise EOFError


@dataclass
class Parquet(Source):
    file: Path

    def __post_init__(self):
        self.size = self.file.stat().st_size

    def fingerprint(self) -> Any:
        return _file_fingerprint(self.file)

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        import pyarrow as pa
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(self.file) as opened:
                rows, groups = opened.metadata.num_rows, opened.metadata.num_row_groups
                size = sum(opened.metadata.row_group(group).total_byte_size for group in range(groups))
                # With a column missing all are read, so that the error can list them.
                known = [column for column in columns if column in opened.schema_arrow.names]
                wanted = known if len(known) == len(columns) else None
                first = 0
                for batch in opened.iter_batches(max(1, rows * BLOCK_BYTES // max(size, 1)), columns=wanted):
                    yield RowBlock(self.file, first, batch, self.size * batch.num_rows // rows)
                    first += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.file} is damaged or truncated: {error}") from None


@dataclass(frozen=True)
class RowBlock:
    file: Path
    first_row: int
    batch: Any
    """pyarrow.RecordBatch"""
    progress: int

    def records(self) -> Iterator[Record]:
        for number, record in enumerate(self.batch.to_pylist(), self.first_row):
            yield Record(self.file.as_posix(), f"{self.file}, row {number}", record)


@dataclass
class SavedDataset(Source):
    """Written by `Dataset.save_to_disk`; as a part of a saved `DatasetDict` its records have the field `split`."""

    folder: Path
    split: str | None

    def __post_init__(self):
        self.files = sorted(self.folder.glob("*.arrow"))
        self.size = sum(file.stat().st_size for file in self.files)

    def fingerprint(self) -> Any:
        return [_file_fingerprint(file) for file in self.files]

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        from datasets import load_from_disk

        try:
            rows = len(load_from_disk(str(self.folder)))
        except Exception as error:  # pyarrow's and json's own errors, and OSError
            raise ValueError(f"{self.folder} is no intact saved dataset: {error}") from None
        step = max(1, rows * BLOCK_BYTES // max(self.size, 1))
        for first in range(0, rows, step):
            last = min(first + step, rows)
            yield DatasetBlock(self.folder, self.split, first, last, self.size * (last - first) // rows)


@dataclass(frozen=True)
class DatasetBlock:
    folder: Path
    split: str | None
    first: int
    last: int
    progress: int

    def records(self) -> Iterator[Record]:
        from datasets import load_from_disk

        extra = {} if self.split is None else {"split": self.split}
        rows = load_from_disk(str(self.folder)).with_format("arrow")[self.first : self.last].to_pylist()
        for number, record in enumerate(rows, self.first):
            yield Record(self.folder.as_posix(), f"{self.folder}, row {number}", {**extra, **record})
