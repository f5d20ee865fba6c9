"""Records in rows: CSV and TSV, Parquet, and folders that `Dataset.save_to_disk` has written."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sgtm.data import readers
from sgtm.data.compression import chunks
from sgtm.data.readers import File, Record, Source, SourceBlock, file_fingerprint, in_blocks, shown
from sgtm.words import counted

DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass
class Delimited(File):
    """CSV (RFC 4180: a field in quotes may hold line ends, a quote in it is doubled), or the same with tabs.

    The first row names the fields; every value is text.
    """

    delimiter: str

    def blocks(self, columns: Sequence[str]) -> Iterator[SourceBlock]:
        yield from in_blocks(self.file, self._rows(columns))

    def _rows(self, columns: Sequence[str]) -> Iterator[tuple[int, dict, int, int]]:
        csv.field_size_limit(sys.maxsize)  # of the process; 131,072 characters by default
        name, lines = shown(self.file), _Lines(self.file)
        rows = csv.reader(lines, delimiter=self.delimiter, strict=True)
        line = 1
        try:
            names = next(rows, None)
            if names is None:
                return
            if repeated := next((field for field in names if names.count(field) > 1), None):
                raise ValueError(f"{name}:{line}: two columns are called {repeated!r}")
            self._check_delimiter(names, columns, f"{name}:{line}")
            wanted = columns if set(columns) <= set(names) else names  # all, so that an error can list them
            line, size = rows.line_num + 1, lines.characters
            for row in rows:
                if row:
                    if len(row) != len(names):
                        raise ValueError(
                            f"{name}:{line}: {counted(len(row), 'field')}, but the first row has {len(names)}"
                        )
                    fields = dict(zip(names, row, strict=True))
                    yield line, {field: fields[field] for field in wanted}, lines.characters - size, lines.read
                line, size = rows.line_num + 1, lines.characters
        except csv.Error as error:
            table_format = "CSV" if self.delimiter == "," else "TSV"
            raise ValueError(f"{name}:{line}: not {table_format}: {error}; the record begins in this line") from None

    def _check_delimiter(self, names: list[str], columns: Sequence[str], where: str) -> None:
        """Raises ValueError where the first row is one field that another delimiter would divide into the columns."""
        others = [(";", "semicolons"), ("\t", "tabs"), ("|", "bars"), (",", "commas")]
        for other, plural in others if len(names) == 1 and not set(columns) <= set(names) else ():
            if len(columns) > 1 and set(columns) <= set(names[0].split(other)):
                right = "commas" if self.delimiter == "," else "tabs"
                remedy = (
                    "call it .tsv" if other == "\t" else "call it .csv" if other == "," else f"save it with {right}"
                )
                raise ValueError(f"{where}: {plural} divide the fields of this row, but it takes {right}; {remedy}")


class _Lines:
    """The lines of a file, decoded, with their line ends. read: bytes of the file. characters: of the lines so far."""

    def __init__(self, file: Path):
        self.file, self.read, self.characters = file, 0, 0

    def __iter__(self) -> Iterator[str]:
        number = 0
        pending: list[bytes] = []
        for data, read in chunks(self.file):
            self.read = read
            *whole, rest = data.split(b"\n")
            for line in whole:
                number += 1
                yield self._decode(b"".join([*pending, line, b"\n"]), number)
                pending = []
            pending.append(rest)
        if line := b"".join(pending):
            yield self._decode(line, number + 1)

    def _decode(self, line: bytes, number: int) -> str:
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            where = f"{shown(self.file)}:{number}"
            raise ValueError(
                f"{where}: not UTF-8 at byte {error.start} of the line: {error.reason}; save the file as UTF-8"
            ) from None
        self.characters += len(text)
        return text


class Parquet(File):
    def blocks(self, columns: Sequence[str]) -> Iterator[SourceBlock]:
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
                for batch in opened.iter_batches(max(1, rows * readers.BLOCK_BYTES // max(size, 1)), columns=wanted):
                    yield RowBlock(self.file, first, batch, self.size * batch.num_rows // rows)
                    first += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{shown(self.file)} is damaged or truncated: {error}") from None


@dataclass(frozen=True)
class RowBlock:
    file: Path
    first_row: int
    batch: Any
    """pyarrow.RecordBatch"""
    progress: int

    def records(self) -> Iterator[Record]:
        for number, record in enumerate(self.batch.to_pylist(), self.first_row):
            yield Record(self.file.as_posix(), f"{shown(self.file)}, row {number}", record)


@dataclass
class SavedDataset(Source):
    """Written by `Dataset.save_to_disk`; as a part of a saved `DatasetDict` its records have the field `split`."""

    folder: Path
    split: str | None

    @cached_property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.arrow"))

    @cached_property
    def size(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def fingerprint(self) -> Any:
        return [file_fingerprint(file) for file in self.files]

    def blocks(self, columns: Sequence[str]) -> Iterator[SourceBlock]:
        from datasets import load_from_disk

        try:
            rows = len(load_from_disk(str(self.folder)))
        except Exception as error:  # pyarrow's and json's own errors, and OSError
            raise ValueError(
                f"{shown(self.folder)} cannot be opened as a saved dataset: {error}; save it again with save_to_disk"
            ) from None
        step = max(1, rows * readers.BLOCK_BYTES // max(self.size, 1))
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
            yield Record(self.folder.as_posix(), f"{shown(self.folder)}, row {number}", {**extra, **record})


def saved_splits(file: Path) -> list[str]:
    """The splits of a saved `DatasetDict`, each in a folder of its name."""
    try:
        splits = json.loads(file.read_text(encoding="utf-8"))["splits"]
        if isinstance(splits, list) and all(isinstance(split, str) for split in splits):
            return splits
        problem = f"splits is {splits!r}"
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise ValueError(
        f'{shown(file)} is damaged ({problem}); expected {{"splits": ["train", ...]}}; save the dataset again'
    )
