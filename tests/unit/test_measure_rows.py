"""Result rows as lines of a file and as text; tests/processes/test_mixings.py has their numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sgtm.measure import rows
from sgtm.measure.rounds import Sample
from sgtm.measure.rows import RowFile, as_parent, failure, row, table

BASE = Sample(np.array([1.0, 2.0, 4.0]), np.array([0.5, 1.0, 2.0]), 100, 10.0)


def test_memory_is_what_is_held_and_what_a_step_adds():
    none = row("none", BASE, None, held=30.0)
    other = row("masked", Sample(BASE.wall, BASE.cpu, 50, 20.0), as_parent(none, BASE), held=60.0)
    assert (none["peak_mib"], other["peak_mib"], other["memory_ratio"]) == (40.0, 80.0, 2.0)
    assert other["ratio"]["p50"] == other["cpu_ratio"]["p50"] == 2.0, "of the time for a token"
    assert (none["of"], other["of"], other["tokens"], other["rounds"]) == (None, "none", 50, 3)


def test_rows_are_added_to_a_file_with_the_environment_of_each(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(rows, "environment", lambda: {"commit": "c0"})
    file = tmp_path / "new" / "rows.jsonl"
    for name in ("a", "b"):
        RowFile(file).write([failure(name, "no memory"), {"row": name}])
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"row": name, **more, "commit": "c0"} for name in "ab" for more in ({"error": "no memory"}, {})
    ]


def test_without_a_file_nothing_is_written_and_no_environment_is_read(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(rows, "environment", lambda: pytest.fail("read"))
    RowFile(None).write([{"row": "a"}])


def test_a_row_that_failed_has_its_error_and_does_not_widen_the_table():
    none = row("none", BASE, None)
    text = table([none, failure("a long name", "no memory, " * 9), {**row("mean", BASE, None), "mean_of": {"a": 1.0}}])
    header, first, failed, mean = text.splitlines()
    assert header.split() == ["row", "tokens/s", "time", "p20/p50/p80", "CPU", "peak", "MiB", "memory"]
    assert first.split() == ["none", "50", "1", "1", "10"] and mean.startswith("mean *")
    assert failed.split(maxsplit=4)[:4] == ["a", "long", "name", "failed"] and failed.endswith("no memory,")
    assert len(first) < 70
