"""JSON: the same records whatever the shape, the size of blocks and chunks; errors name the line; time grows with the
size alone.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_files import assert_refused, in_chunks, read, times_of_long_records

from sgtm.data import json_records

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


def test_where_a_record_begins(tmp_path):
    (tmp_path / "a.json").write_text('\n[\n {"text": "a\\nb"},\n\n {"text":\n "c"}, {"text": "d"}]')
    assert [where for where, _ in read(tmp_path / "a.json")] == ["3", "5", "6"]


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
]


@pytest.mark.parametrize(("suffix", "content", "message"), BROKEN)
@pytest.mark.parametrize("size", [1000, 7])
def test_an_error_names_the_line(tmp_path, monkeypatch, suffix, content, message, size):
    in_chunks(monkeypatch, size)
    assert_refused(tmp_path / f"a{suffix}", content, message)


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


@pytest.mark.parametrize(
    ("suffix", "before", "after"),
    [
        (".jsonl", '{"text": "', '"}'),
        (".json", '[{"text": "', '"}]'),
    ],
    ids=["line", "array"],
)
def test_the_time_of_a_long_record_is_linear(tmp_path, monkeypatch, suffix, before, after):
    """Eight times the size, in small chunks: 64 times the time if it were quadratic."""
    in_chunks(monkeypatch, 2**12)
    short, long = times_of_long_records(tmp_path, suffix, before, after)
    assert long < 24 * short + 0.2
