"""Files of a checkpoint are hashed as they are written, and do not fill the page cache."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
from pathlib import Path

import pytest
import torch

from sgtm import files
from sgtm.files import HashedFile

CHUNK = 64 * 1024


def cached(path: Path) -> int:
    """Bytes of the file that are in the page cache."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(first), ctypes.c_size_t(len(mapped)), pages)
        del first
    assert not failed
    return mmap.PAGESIZE * sum(page & 1 for page in pages)


@pytest.fixture
def gives_back(tmp_path: Path) -> None:
    """Skips where files are in memory, or stay there (tmpfs)."""
    control = tmp_path / "control"
    with open(control, "wb") as file:
        file.write(bytes(4 * CHUNK))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(control):
        pytest.skip(f"{tmp_path} keeps its files in memory")


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 10 * CHUNK + 77])
def test_content_size_and_hash(tmp_path: Path, monkeypatch, size: int):
    monkeypatch.setattr(files, "CHUNK", CHUNK)
    content = os.urandom(size)
    with open(tmp_path / "file", "wb") as file:
        hashed = HashedFile(file)
        assert hashed.write(content) == size and hashed.write(memoryview(content)) == size
        hashed.sync()
    assert (tmp_path / "file").read_bytes() == 2 * content
    assert hashed.bytes == 2 * size and hashed.digest.hexdigest() == hashlib.sha256(2 * content).hexdigest()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice about files")
@pytest.mark.parametrize("tensors", [1, 40])
def test_little_of_it_is_in_the_page_cache(tmp_path: Path, monkeypatch, gives_back, tensors: int):
    """One tensor as large as the file, or many small ones."""
    monkeypatch.setattr(files, "CHUNK", CHUNK)
    path, seen = tmp_path / "file", []

    class Watched(HashedFile):
        def sync(self) -> None:
            self.flush()
            seen.append(cached(path))
            super().sync()

    state = [torch.randn(40 * CHUNK // 4 // tensors) for _ in range(tensors)]
    with open(path, "wb") as file:
        hashed = Watched(file)
        torch.save(state, hashed)
        hashed.sync()
    assert len(seen) > 15 and max(seen) <= 3 * CHUNK and cached(path) == 0
    assert all(torch.equal(a, b) for a, b in zip(torch.load(path), state, strict=True))
