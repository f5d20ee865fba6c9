"""The records of one input file, and reading it in small pieces."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sgtm.data import json_records, readers, tables
from sgtm.data.discover import open_sources

SIZES = 2 * 2**20, 16 * 2**20


def read(file: Path, columns=("text",)) -> list[tuple[str, dict]]:
    (source,) = open_sources([file])
    return [
        (record.where.removeprefix(f"{file}:"), record.fields)
        for block in source.blocks(columns)
        for record in block.records()
    ]


def assert_refused(file: Path, content: str, message: str) -> None:
    """`message`, a pattern, begins with the line; a surrogate in `content` stands for a byte that is not UTF-8."""
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"{file.name}:{message}"):
        read(file)


def in_chunks(monkeypatch, size: int, blocks: int = 10**6) -> None:
    """Files are read so many bytes at a time, and cut into blocks of at least `blocks` bytes."""

    def chunks(file):
        data = file.read_bytes()
        for start in range(0, len(data), size):
            yield data[start : start + size], min(start + size, len(data))

    monkeypatch.setattr(json_records, "chunks", chunks)
    monkeypatch.setattr(tables, "chunks", chunks)
    monkeypatch.setattr(readers, "BLOCK_BYTES", blocks)


def times_of_long_records(folder: Path, suffix: str, before: str, after: str) -> list[float]:
    """CPU seconds that reading a record takes, one of 2 MiB and one of eight times as much between the same ends."""
    seconds = []
    for size in SIZES:
        (file := folder / f"{size}{suffix}").write_text(before + "x" * size + after)
        seconds.append(min(_cpu_seconds(file) for _ in range(2)))
    return seconds


def _cpu_seconds(file: Path) -> float:
    start = time.process_time()
    read(file)
    return time.process_time() - start
