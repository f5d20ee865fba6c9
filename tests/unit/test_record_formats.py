"""JSON in all its shapes, CSV and TSV: the same records whatever the shape, the size of blocks and chunks; errors name
the line; time grows with the size alone.
"""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgtm.data import json_records, readers, tables
from sgtm.data.discover import open_sources

Content = list[dict]


def read(file: Path, columns=("text",)) -> list[tuple[str, dict]]:
    (source,) = open_sources([file])
    return [
        (found.where.removeprefix(f"{file}:"), found.fields)
        for block in source.blocks(columns)
        for found in block.records()
    ]


def in_chunks(monkeypatch, size: int, blocks: int = 10**6) -> None:
    """Files are read so many bytes at a time, and cut into blocks of at least `blocks` bytes."""

    def chunks(file):
        data = file.read_bytes()
        for start in range(0, len(data), size):
            yield data[start : start + size], min(start + size, len(data))

    monkeypatch.setattr(json_records, "chunks", chunks)
    monkeypatch.setattr(tables, "chunks", chunks)
    monkeypatch.setattr(readers, "BLOCK_BYTES", blocks)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.one_of(TEXTS, st.integers(), st.none(), st.booleans(), st.lists(TEXTS, max_size=2))
RECORDS = st.lists(st.fixed_dictionaries({"text": TEXTS}, optional={"a": VALUES, "b": VALUES}), min_size=1, max_size=6)
SHAPES = {
    "lines": lambda records, ascii: "\n".join(json.dumps(one, ensure_ascii=ascii) for one in records),
    "lines and blank lines": lambda records, ascii: "".join(
        json.dumps(one, ensure_ascii=ascii) + "\r\n \n" for one in records
    ),
    "array": lambda records, ascii: json.dumps(records, ensure_ascii=ascii),
    "array over lines": lambda records, ascii: json.dumps(records, ensure_ascii=ascii, indent=3) + "\n\n",
    "objects over lines": lambda records, ascii: "\n".join(
        json.dumps(one, ensure_ascii=ascii, indent=1) for one in records
    ),
}


@settings(max_examples=150, deadline=None)
@given(
    RECORDS,
    st.sampled_from(list(SHAPES)),
    st.booleans(),
    st.sampled_from(["", "\ufeff", "\n  "]),
    st.integers(1, 40),
    st.integers(1, 60),
)
def test_json_of_any_shape(tmp_path_factory, records, shape, ascii, beginning, size, blocks):
    file = tmp_path_factory.mktemp("json") / "a.json"
    file.write_bytes((beginning + SHAPES[shape](records, ascii)).encode())
    with pytest.MonkeyPatch.context() as patch:
        in_chunks(patch, size, blocks)
        assert [fields for _, fields in read(file)] == records


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(CELLS.filter(bool), CELLS), max_size=6),
    st.sampled_from([".csv", ".tsv"]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["", "\ufeff"]),
    st.integers(1, 40),
    st.integers(1, 60),
)
def test_tables(tmp_path_factory, rows, suffix, line_end, beginning, size, blocks):
    writer = csv.writer(buffer := io.StringIO(newline=""), delimiter=tables.DELIMITERS[suffix], lineterminator=line_end)
    writer.writerows([("text", "category"), *rows])
    (file := tmp_path_factory.mktemp("table") / f"a{suffix}").write_bytes((beginning + buffer.getvalue()).encode())
    with pytest.MonkeyPatch.context() as patch:
        in_chunks(patch, size, blocks)
        found = read(file, ("category", "text"))
    assert [(fields["text"], fields["category"]) for _, fields in found] == rows
    lines = [line for line, _ in found]
    assert lines == sorted(lines, key=int) and (not rows or lines[0] == "2")


def test_where_a_record_begins(tmp_path):
    (tmp_path / "a.json").write_text('\n[\n {"text": "a\\nb"},\n\n {"text":\n "c"}, {"text": "d"}]')
    assert [where for where, _ in read(tmp_path / "a.json")] == ["3", "5", "6"]
    (tmp_path / "a.csv").write_text('text,n\n"a\nb",1\n\nc,2\n')
    assert read(tmp_path / "a.csv") == [("2", {"text": "a\nb"}), ("5", {"text": "c"})]
    assert read(tmp_path / "a.csv", ("text", "none"))[1] == ("5", {"text": "c", "n": "2"}), "for the error's list"


BROKEN = [
    (".json", '[{"text": "a"},\n {"text": "b"\n {"text": "c"}]', "3: not JSON: Expecting ',' delimiter"),
    (".json", '[{"text": "a"},\n]', "2: not JSON: Expecting value"),
    (".json", '[{"text": "a"}\n', "2: not JSON: the array does not end"),
    (".json", '[{"text": "a"},\n {"text": "b', "2: not JSON: Unterminated string"),
    (".json", '[{"text": "a"}\n {"text": "b"}]', "2: not JSON: expected , or ] after a member"),
    (".json", '[{"text": "a"}]\n[]', "2: not JSON: there is more text after the end of the array"),
    (".json", '[{"text": "a"},\n 7]', "2: expected a JSON object, got int"),
    (".json", '{"text":\n "a"}\n\n7', "4: expected a JSON object, got int"),
    (".json", '{"text":\n "a\tb"}', "2: not JSON: Invalid control character"),
    (".json", '[\n{"a": ' + "[" * 100_000, "2: not JSON that can be read: nested too deeply"),
    (".json", '[\n{"a": ' + "7" * 5000 + "}]", "2: not JSON that can be read: .*4300 digits"),
    (".json", '[\n\n{"text": "\udcff"}]', "3: not UTF-8"),
    (".jsonl", '{"text": "a"}\n{"text":\n "b"}', "2: not JSON: Expecting value at character 8"),
    (".csv", "text,text\na,b", "1: two columns are called 'text'"),
    (".csv", "text,category\na,b\nc", "3: 1 field, but the first row has 2"),
    (".csv", 'text,category\na,b\n"c,d\ne,f\n', "3: not CSV: unexpected end of data; the record begins in this line"),
    (".tsv", 'text\n"a" b\tc\n', "2: not TSV: '\t' expected after '\"'"),
    (".csv", "text\na\n\udcff\n", "3: not UTF-8 at byte 0 of the line"),
]


@pytest.mark.parametrize(("suffix", "content", "message"), BROKEN)
@pytest.mark.parametrize("size", [1000, 7])
def test_an_error_names_the_line(tmp_path, monkeypatch, suffix, content, message, size):
    in_chunks(monkeypatch, size)
    (file := tmp_path / f"a{suffix}").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"a{suffix}:{message}"):
        read(file)


def test_an_error_is_found_where_it_is_and_not_at_the_end_of_the_file(tmp_path, monkeypatch):
    taken = []

    def chunks(file):
        yield b'[{"text": "a"}, {"text" "b"}' + b" " * 100 + b"x", 1
        for _ in range(100):
            taken.append(1)
            yield b"{" * 100, 1

    (tmp_path / "a.json").write_bytes(b"[")
    monkeypatch.setattr(json_records, "chunks", chunks)
    monkeypatch.setattr(json_records, "_FIRST", 10)
    with pytest.raises(ValueError, match="Expecting ':' delimiter"):
        read(tmp_path / "a.json")
    assert not taken


SIZES = 2 * 2**20, 16 * 2**20


def cpu_seconds(file: Path) -> float:
    start = time.process_time()
    read(file)
    return time.process_time() - start


@pytest.mark.parametrize(
    ("suffix", "before", "after"),
    [
        (".jsonl", '{"text": "', '"}'),
        (".json", '[{"text": "', '"}]'),
        (".csv", "text\n", ""),
        (".csv", 'text\n"\n', '"'),
    ],
    ids=["line", "array", "csv", "quoted csv"],
)
def test_the_time_of_a_long_record_is_linear(tmp_path, monkeypatch, suffix, before, after):
    """Eight times the size, in small chunks: 64 times the time if it were quadratic."""
    in_chunks(monkeypatch, 2**14)
    seconds = []
    for size in SIZES:
        (file := tmp_path / f"{size}{suffix}").write_text(before + "x" * size + after)
        seconds.append(min(cpu_seconds(file) for _ in range(2)))
    assert seconds[1] < 24 * seconds[0] + 0.2
