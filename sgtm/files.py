"""Files that are whole or not there, and their hashes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

CHUNK = 16 * 2**20  # bytes that `HashedFile` writes, puts on the disk and gives back at a time


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends: flushed to the disk, then renamed.

    An error in the block leaves `path` as it was; a killed process also leaves a file whose name ends in `.tmp`. An
    OSError, as of a full disk, names `path`.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (Exception, KeyboardInterrupt) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError in the block that names no file, as of a full disk, names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Writes a small file, in UTF-8: it is there whole or as it was."""
    with replacing(path) as file:
        file.write(text.encode())


def sync_directory(directory: Path) -> None:
    """Flush the names in a directory, as a rename is only safe on the disk when its directory is."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex digest of a file of any size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class HashedFile:
    """A file open for writing that hashes what passes through, and of which little is in the page cache at any time."""

    def __init__(self, file: BinaryIO):
        self.file, self.bytes, self.digest = file, 0, hashlib.sha256()
        self._synced = 0

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
            self.digest.update(part)
            self.file.write(part)
            self.bytes += len(part)
            if self.bytes - self._synced >= CHUNK:
                self.sync()
        return len(view)

    def sync(self) -> None:
        """What has been written is on the disk, and no longer in the page cache."""
        self.flush()
        os.fsync(self.file.fileno())
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._synced = self.bytes

    def flush(self) -> None:
        self.file.flush()
