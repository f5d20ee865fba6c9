"""Compressed files: every frame and window is read; what is not what its name states is named for what it is."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from pathlib import Path

import pytest
import zstandard

from sgtm.data import compression
from sgtm.data.compression import chunks, compression_of, format_of
from sgtm.data.discover import open_sources

TEXT = b'{"text": "x", "category": "en"}\n'
KINDS = {
    "gzip": gzip.compress(TEXT),
    "bzip2": bz2.compress(TEXT),
    "xz": lzma.compress(TEXT),
    "Zstandard": zstandard.ZstdCompressor().compress(TEXT),
    "plain text": TEXT,
    "Parquet": b"PAR1" + bytes(60) + b"PAR1",
    "a zip archive": b"PK\x03\x04" + bytes(60),
    "UTF-16 text": TEXT.decode().encode("utf-16"),
}
SUFFIXES = {"gzip": ".gz", "bzip2": ".bz2", "xz": ".xz", "Zstandard": ".zst", "plain text": ""}
REMEDIES = {
    "a zip archive": "unpack it",
    "UTF-16 text": "save it as UTF-8",
    "Parquet": "rename it to end in .parquet",
    **{kind: rf"rename it to a\.jsonl{suffix.replace('.', '[.]')}$" for kind, suffix in SUFFIXES.items()},
}


def content(file: Path) -> bytes:
    return b"".join(data for data, _ in chunks(file))


@pytest.mark.parametrize("stated", SUFFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_not_what_its_name_states_is_named_for_what_it_is(tmp_path, stated, kind):
    (file := tmp_path / f"a.jsonl{SUFFIXES[stated]}").write_bytes(KINDS[kind])
    if kind == stated:
        assert content(file) == TEXT
        return
    with pytest.raises(ValueError, match=rf"{file}.* {kind}(, which its name does not state)?; {REMEDIES[kind]}"):
        content(file)
    with pytest.raises(ValueError, match=kind):
        open_sources([file])


def test_the_first_bytes_of_text_files_count_too(tmp_path):
    (tmp_path / "a.txt").write_bytes(gzip.compress(b"text"))
    (source,) = open_sources([tmp_path])
    with pytest.raises(ValueError, match=r"a\.txt is gzip, which its name does not state; rename it to a\.txt\.gz"):
        [list(block.records()) for block in source.blocks(["text"])]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_what_is_empty_or_noise_is_damaged_and_not_mislabelled(tmp_path, suffix):
    (file := tmp_path / f"a.jsonl{suffix}").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is empty, but its name states \w+; download it again"):
        content(file)
    file.write_bytes(b"\0\1\2\xff" * 50)
    with pytest.raises(ValueError, match=r"is damaged: it does not begin as"):
        content(file)


def test_plain_text_may_begin_as_it_likes(tmp_path):
    for beginning in (b"", b"BZh", b"BZhello", "ÿþ".encode(), b"\xef\xbb\xbfx"):
        (file := tmp_path / "a.txt").write_bytes(beginning)
        assert content(file) == beginning


@pytest.mark.parametrize("window_log", [20, 27, 28, 31])
def test_zstandard_files_of_every_window(tmp_path, window_log):
    """The header of a frame states the window, whatever the size of the content, here of repeated bytes."""
    header = struct.pack("<IBB", 0xFD2FB528, 0, (window_log - 10) << 3)
    blocks = [struct.pack("<I", 2**17 << 3 | 1 << 1 | last)[:3] + b"x" for last in (0, 0, 1)]
    (file := tmp_path / "a.jsonl.zst").write_bytes(header + b"".join(blocks))
    assert content(file) == b"x" * (3 * 2**17)


def test_frames_of_zstandard_that_hold_no_content_are_skipped(tmp_path):
    skipped = struct.pack("<II", 0x184D2A53, 5) + b"skip!"
    frame = zstandard.ZstdCompressor().compress
    (file := tmp_path / "a.jsonl.zst").write_bytes(skipped + frame(b"one ") + frame(b"") + skipped + frame(b"two"))
    assert content(file) == b"one two"


def test_chunks_of_highly_compressed_files_are_bounded(tmp_path):
    size = 300 * 2**20
    (file := tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(bytes(size)))
    lengths = [len(data) for data, _ in chunks(file)]
    assert sum(lengths) == size and max(lengths) <= 2**15 * compression._ZSTANDARD_INPUT


def test_names():
    assert [compression_of(name) for name in ("a.jsonl.GZ", "a.jsonl", "gz")] == ["gzip", None, None]
    names = ("a.JSONL.gz", "a.json.Zst", "a.b.csv", "a", "gz", "a.gz")
    assert [format_of(name) for name in names] == [".jsonl", ".json", ".csv", "", "", ""]
