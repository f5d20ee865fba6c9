"""A file is there whole or as it was, whatever happens while it is written."""

import hashlib
import os

import pytest

from sgtm import files
from sgtm.files import replacing, sha256_of, write_atomically


def test_written_whole_and_in_utf_8(tmp_path):
    path = tmp_path / "file"
    for text in ("first\n", "día\r\n"):
        write_atomically(path, text)
        assert path.read_bytes() == text.encode()
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half")
        file.flush()
        assert path.read_text() == "before"
        raise KeyboardInterrupt
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["file"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("before")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_atomically(path, "after")
    assert error.value.filename == str(path), "the file that was meant"
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_hash(tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_byte_is_flushed_before_the_rename(tmp_path, monkeypatch):
    path, seen, flush = tmp_path / "file", [], os.fsync

    def watched(descriptor):
        seen.append((os.fstat(descriptor).st_size, path.exists()))
        flush(descriptor)

    monkeypatch.setattr(files.os, "fsync", watched)
    write_atomically(path, "some bytes")
    assert seen == [(10, False)]


def test_two_processes_write_the_same_file(tmp_path, monkeypatch):
    """The later one wins, and neither sees the other's half."""
    path = tmp_path / "file"
    monkeypatch.setattr(files.os, "getpid", lambda: 1)
    with replacing(path) as file:
        file.write(b"first process")
        monkeypatch.setattr(files.os, "getpid", lambda: 2)
        write_atomically(path, "second")
        assert path.read_text() == "second"
    assert path.read_text() == "first process" and os.listdir(tmp_path) == ["file"]
