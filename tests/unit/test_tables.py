"""CSV and TSV: the same records whatever the size of blocks and chunks; errors name the line; time grows with the size
alone. Rows of Parquet and saved datasets are numbered over their blocks. All through `prepare`: test_data_prepare.py.
"""

from __future__ import annotations

import csv
import io

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from record_files import assert_refused, in_chunks, read, times_of_long_records

from sgtm.data import readers, tables
from sgtm.data.discover import open_sources

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
def test_rows_are_the_same_in_any_chunks_and_blocks(tmp_path_factory, rows, suffix, line_end, beginning, size, blocks):
    writer = csv.writer(buffer := io.StringIO(newline=""), delimiter=tables.DELIMITERS[suffix], lineterminator=line_end)
    writer.writerows([("text", "category"), *rows])
    (file := tmp_path_factory.mktemp("table") / f"a{suffix}").write_bytes((beginning + buffer.getvalue()).encode())
    with pytest.MonkeyPatch.context() as patch:
        in_chunks(patch, size, blocks)
        records = read(file, ("category", "text"))
    assert [(fields["text"], fields["category"]) for _, fields in records] == rows
    lines = [line for line, _ in records]
    assert lines == sorted(lines, key=int) and (not rows or lines[0] == "2")


def test_where_a_record_begins(tmp_path):
    (tmp_path / "a.csv").write_text('text,n\n"a\nb",1\n\nc,2\n')
    assert read(tmp_path / "a.csv") == [("2", {"text": "a\nb"}), ("5", {"text": "c"})]
    assert read(tmp_path / "a.csv", ("text", "none"))[1] == ("5", {"text": "c", "n": "2"}), "for the error's list"


BROKEN = [
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
    assert_refused(tmp_path / f"a{suffix}", content, message)


@pytest.mark.parametrize(
    ("suffix", "before", "after"),
    [(".csv", "text\n", ""), (".csv", 'text\n"\n', '"')],
    ids=["csv", "quoted csv"],
)
def test_the_time_of_a_long_record_is_linear(tmp_path, monkeypatch, suffix, before, after):
    """Eight times the size, in small chunks: 64 times the time if it were quadratic."""
    in_chunks(monkeypatch, 2**12)
    short, long = times_of_long_records(tmp_path, suffix, before, after)
    assert long < 24 * short + 0.2


ROWS = [{"text": f"text {number}", "category": "en", "n": number} for number in range(7)]


def saved_as_parquet(folder):
    parquet.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet", row_group_size=3)
    return folder / "a.parquet"


def saved_as_dataset(folder):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "a"))
    return folder / "a"


@pytest.mark.parametrize("save", [saved_as_parquet, saved_as_dataset])
@pytest.mark.parametrize(("block_bytes", "count"), [(1, 7), (10**6, 1)])
def test_rows_are_numbered_over_blocks_which_stand_for_the_whole_file(tmp_path, monkeypatch, save, block_bytes, count):
    monkeypatch.setattr(readers, "BLOCK_BYTES", block_bytes)
    path = save(tmp_path)
    (source,) = open_sources([path])
    blocks = list(source.blocks(["text", "category"]))
    assert len(blocks) == count
    assert source.size - len(blocks) < sum(block.progress for block in blocks) <= source.size
    records = [(record.where, record.fields["text"]) for block in blocks for record in block.records()]
    assert records == [(f"{path}, row {number}", f"text {number}") for number in range(7)]


def test_other_columns_of_parquet_are_read_where_one_is_missing_alone(tmp_path):
    (source,) = open_sources([saved_as_parquet(tmp_path)])
    for columns, fields in ((["n", "text"], {"text", "n"}), (["body"], {"text", "category", "n"})):
        (block, *_) = source.blocks(columns)
        assert {name for record in block.records() for name in record.fields} == fields
