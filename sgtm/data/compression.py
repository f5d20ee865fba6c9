"""Compressed input: the compression that a file's name states, checked against its first bytes; content in chunks."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from io import BufferedIOBase, BufferedReader
from pathlib import Path

COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard", ".zstd": "Zstandard"}
_SUFFIX_OF = {name: suffix for suffix, name in reversed(COMPRESSIONS.items())}
_BEGINNINGS = {
    "gzip": rb"\x1f\x8b",
    "bzip2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    "xz": rb"\xfd7zXZ\x00",
    "Zstandard": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
    "Parquet": rb"PAR1",
    "a zip archive": rb"PK\x03\x04",
    "UTF-16 text": rb"\xff\xfe|\xfe\xff",
}
_OPENERS: dict[str, Callable[[BufferedReader], BufferedIOBase]] = {
    "gzip": gzip.open,
    "bzip2": bz2.open,
    "xz": lzma.open,
}
_REMEDY = {"a zip archive": "unpack it", "UTF-16 text": "save it as UTF-8", "Parquet": "rename it to end in .parquet"}
_HEAD = 64
_ZSTANDARD_INPUT = 2**12
"""Bytes that are decompressed at a time: at most 128 MiB, at the largest ratio of the format, 2^17 to 4."""
_ZSTANDARD_WINDOW = 2**31
"""The largest of the format, `--long=31`; a file's own window is what its decompression holds in memory."""


def compression_of(name: str) -> str | None:
    """What the name of a file states; None for one that is not compressed."""
    return COMPRESSIONS.get(Path(name).suffix.lower())


def format_of(name: str) -> str:
    """The suffix that states the format, in small letters: `.jsonl` of `a.JSONL.gz`; empty where there is none."""
    return Path(name.lower().removesuffix(Path(name).suffix.lower()) if compression_of(name) else name).suffix.lower()


def chunks(file: Path) -> Iterator[tuple[bytes, int]]:
    """The content, decompressed as the name states, and how many bytes of the file have been read so far.

    A chunk holds 1 MiB, of a Zstandard file what 4 KiB of it hold; a Zstandard file's window comes on top.

    Raises ValueError for a file that is damaged, ends too early, or is of another kind than its name states.
    """
    compression = compression_of(file.name)
    with file.open("rb") as handle:
        check_beginning(file, handle.read(_HEAD))
        handle.seek(0)
        try:
            for data in _zstandard(handle) if compression == "Zstandard" else _read(handle, compression):
                yield data, handle.tell()
        except EOFError:
            raise ValueError(f"{file} is truncated: the compressed data end too early; fetch it again") from None
        except (lzma.LZMAError, zlib.error, OSError) as error:
            raise ValueError(f"{file} is damaged: {error}") from None


def check_beginning(file: Path, head: bytes) -> None:
    """Raises ValueError, with a remedy, where the first bytes are of another kind than the name states."""
    stated = compression_of(file.name)
    compression = next((name for name, beginning in _BEGINNINGS.items() if re.match(beginning, head)), None)
    if compression == stated or (not head and stated):
        if not head and stated:
            raise ValueError(f"{file} is empty, but its name states {stated}; download it again")
        return
    bare = file.name if stated is None else file.name[: -len(file.suffix)]
    content = compression or "plain text"
    remedy = _REMEDY.get(content, f"rename it to {bare}{_SUFFIX_OF.get(content, '')}")
    if stated is None:
        raise ValueError(f"{file} is {content}, which its name does not state; {remedy}")
    if compression is None and not _is_text(head):
        raise ValueError(f"{file} is damaged: it does not begin as {stated} does; fetch it again")
    raise ValueError(f"{file} is not {stated}, as its name states, but {content}; {remedy}")


def _is_text(head: bytes) -> bool:
    """Whether the beginning of a file is UTF-8, but for a character that is cut off, without control characters."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode("utf-8-sig")
    return not re.search(r"[\x00-\x08\x0e-\x1f]", text)


def _read(handle: BufferedReader, compression: str | None) -> Iterator[bytes]:
    content = handle if compression is None else _OPENERS[compression](handle)
    while data := content.read(2**20):
        yield data


def _zstandard(handle: BufferedReader) -> Iterator[bytes]:
    """Every frame of the file; unlike the library's stream reader, it notices a last frame that is cut short."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTANDARD_WINDOW)
    frame, pending, started = decompressor.decompressobj(), b"", False
    try:
        while data := pending or handle.read(_ZSTANDARD_INPUT):
            started = True
            yield frame.decompress(data)
            pending = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame, started = decompressor.decompressobj(), False
    except zstandard.ZstdError as error:
        raise OSError(error) from None
    if started:
        raise EOFError
