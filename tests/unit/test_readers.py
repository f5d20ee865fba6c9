"""Sources cut into blocks: where blocks end, what a record is called, and which text files are read."""

import os
from pathlib import Path

import pytest

from sgtm.data import readers
from sgtm.data.readers import Record, TextFiles, file_fingerprint, in_blocks, shown

VALUES = [(1, {"n": 0}, 6, 10), (3, {"n": 1}, 6, 25), (4, {"n": 2}, 2, 30)]
"""(line, fields, characters, bytes read so far) of three records."""


def blocks_of(source, columns=()) -> list[tuple[int, list[Record]]]:
    return [(block.progress, list(block.records())) for block in source.blocks(columns)]


@pytest.mark.parametrize(
    ("block_bytes", "progress"), [(1, [10, 15, 5]), (6, [10, 15, 5]), (7, [25, 5]), (14, [30]), (100, [30])]
)
def test_a_block_ends_with_the_record_that_fills_it(tmp_path, monkeypatch, block_bytes, progress):
    monkeypatch.setattr(readers, "BLOCK_BYTES", block_bytes)
    blocks = list(in_blocks(tmp_path / "a.json", VALUES))
    assert [block.progress for block in blocks] == progress
    path = (tmp_path / "a.json").as_posix()
    records = [record for block in blocks for record in block.records()]
    assert records == [Record(path, f"{path}:{line}", fields) for line, fields, _, _ in VALUES]


def test_a_record_that_is_no_object_is_named_by_its_line(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json:3: expected a JSON object, got list"):
        list(in_blocks(tmp_path / "a.json", [*VALUES[:1], (3, [1], 3, 25)]))


def test_a_file_without_records_has_no_block(tmp_path):
    assert list(in_blocks(tmp_path / "a.json", [])) == []


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Of 4, 5, and 1 bytes; the second has a byte order mark."""
    (tmp_path / "en").mkdir()
    paths = [tmp_path / f"en/{name}.txt" for name in "abc"]
    for file, data in zip(paths, (b"text", b"\xef\xbb\xbfab", b"c"), strict=True):
        file.write_bytes(data)
    return paths


def test_a_text_file_is_a_document_of_its_folders_name(files):
    expected = [Record(str(file), str(file), {"text": text, "category": "en"})
                for file, text in zip(files, ("text", "ab", "c"), strict=True)]  # fmt: skip
    assert blocks_of(TextFiles(files)) == [(10, expected)]


def test_the_folder_of_a_relative_path_is_that_on_the_disk(files, monkeypatch):
    monkeypatch.chdir(files[0].parent)
    ((_, (record,)),) = blocks_of(TextFiles([Path("a.txt")]))
    assert (record.path, record.fields["category"]) == ("a.txt", "en")


@pytest.mark.parametrize(("block_bytes", "progress"), [(4, [4, 5, 1]), (5, [9, 1]), (9, [9, 1]), (10, [10])])
def test_text_files_are_in_blocks_of_the_size_of_their_files(files, monkeypatch, block_bytes, progress):
    monkeypatch.setattr(readers, "BLOCK_BYTES", block_bytes)
    source = TextFiles(files)
    assert [progress for progress, _ in blocks_of(source)] == progress and source.size == sum(progress) == 10


def test_a_text_file_that_is_not_utf8_is_named_with_the_byte(files):
    files[2].write_bytes(b"ab\xe9")
    with pytest.raises(ValueError, match=r"c\.txt: not UTF-8 at byte 2: "):
        blocks_of(TextFiles(files))


@pytest.mark.parametrize("change", ["content", "time", "name"])
def test_the_fingerprint_changes_with_the_input(files, change):
    before, stat = TextFiles(files).fingerprint(), files[0].stat()
    assert before == TextFiles(files).fingerprint() == [file_fingerprint(file) for file in files]
    if change == "content":
        files[0].write_bytes(b"other")
        os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "time":
        os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
    else:
        files[0] = files[0].rename(files[0].with_name("z.txt"))
    assert TextFiles(files).fingerprint() != before


def test_bytes_of_a_name_that_are_not_utf8_are_shown_as_such():
    assert shown(Path(os.fsdecode(b"caf\xe9/\xc3\xb1.txt"))) == "caf\\xe9/ñ.txt"
