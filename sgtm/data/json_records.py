"""Records in JSON: an object per line, an array of objects, or objects that run over several lines.

The first character decides, not the name: `[` begins an array. Lines are cut into blocks unread, and parsed by the
workers; of the other two the reading process parses one value after another, and holds little more than one at a time.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from sgtm.data import readers
from sgtm.data.compression import chunks, format_of
from sgtm.data.readers import File, Record, SourceBlock, in_blocks, shown

SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".json")
_NOT_BLANK = re.compile(r"[^ \t\r\n]")
_FIRST = 2**16  # bytes in which a .json file's first line must end for its objects to be read over several lines
_LONGEST_WORD = 16  # characters: an error this near the end of what has been read may be a word that is cut

Chunk = tuple[bytes, int]
"""Content, and how many bytes of the file have been read so far."""


class Json(File):
    """Plain or compressed. Blank lines are skipped."""

    def blocks(self, columns: Sequence[str]) -> Iterator[SourceBlock]:
        content, ahead, first = chunks(self.file), [], b""
        for chunk in content:
            ahead.append(chunk)
            first = (first + chunk[0]).removeprefix(codecs.BOM_UTF8).lstrip()
            if len(first) >= _FIRST:
                break
        content = chain(ahead, content)
        if first.startswith(b"[") or (format_of(self.file.name) == ".json" and _is_cut_by_line_end(first)):
            yield from in_blocks(self.file, _values(self.file, content))
        else:
            yield from _lines(self.file, content)


def _is_cut_by_line_end(first: bytes) -> bool:
    """Whether an object begins in the first line and does not end there."""
    line, end, _ = first.partition(b"\n")
    if not end or not line.startswith(b"{"):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def _lines(file: Path, content: Iterable[Chunk]) -> Iterator[SourceBlock]:
    """Blocks of lines: each ends with the first line end at or after `BLOCK_BYTES`."""
    pending: list[bytes] = []
    size, line, before, read = 0, 1, 0, 0
    for data, read in content:
        start = 0
        while end := data.find(b"\n", max(start, start + readers.BLOCK_BYTES - 1 - size)) + 1:
            block = b"".join([*pending, data[start:end]])
            yield LineBlock(file, line, block, read - before)
            line, before, start = line + block.count(b"\n"), read, end
            pending, size = [], 0
        pending.append(data[start:])
        size += len(data) - start
    yield LineBlock(file, line, b"".join(pending), read - before)


@dataclass(frozen=True)
class LineBlock:
    file: Path
    first_line: int
    data: bytes
    progress: int

    def records(self) -> Iterator[Record]:
        name = shown(self.file)
        for number, line in enumerate(self.data.split(b"\n"), self.first_line):
            where = f"{name}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                record = json.loads(text) if text else None
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 at byte {error.start} of the line: {error.reason}") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error.msg} at character {error.pos}") from None
            except (RecursionError, ValueError) as error:
                raise _unreadable(where, error) from None
            if not text:
                continue
            if not isinstance(record, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
            yield Record(self.file.as_posix(), where, record)


def _unreadable(where: str, error: RecursionError | ValueError) -> ValueError:
    """Of JSON that is right and too much for the parser. A ValueError: a number of more digits than Python converts."""
    problem = "nested too deeply" if isinstance(error, RecursionError) else error
    return ValueError(f"{where}: not JSON that can be read: {problem}")


def _values(file: Path, content: Iterable[Chunk]) -> Iterator[tuple[int, Any, int, int]]:
    """The members of an array, or values one after another: line, value, characters, bytes read so far."""
    text = _Text(file, content)
    array = text.peek() == "["
    if array:
        text.position += 1
    first = True
    while (character := text.peek()) and not (array and first and character == "]"):
        yield text.value()
        first = False
        if array:
            character = text.peek()
            if character != ",":
                break
            text.position += 1
    if array:
        if character != "]":
            raise text.error("expected , or ] after a member of the array" if character else "the array does not end")
        text.position += 1
        if text.peek():
            raise text.error("there is more text after the end of the array")


class _Text:
    """Text of a file from `position` on, as far as it has been read."""

    def __init__(self, file: Path, content: Iterable[Chunk]):
        self.file, self.position = file, 0
        self._content, self._decoder = iter(content), codecs.getincrementaldecoder("utf-8")()
        self._text, self._read, self._started = "", 0, False
        self._lines, self._counted = 1, 0
        self._json = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not blank, to which `position` moves; none at the end of the file."""
        while True:
            match = _NOT_BLANK.search(self._text, self.position)
            self.position = match.start() if match else len(self._text)
            if match:
                return match[0]
            if not self._more():
                return ""

    def value(self) -> tuple[int, Any, int, int]:
        """Reads the value at `position`; line in which it begins, value, characters, bytes of the file read so far."""
        line = self._line()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self.position)
                length = end - self.position
                if end < len(self._text) or not self._more():
                    self.position += length
                    return line, value, length, self._read
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or not self._text[error.pos + _LONGEST_WORD :].strip()
                length = error.pos - self.position
                if not (cut and self._more()):
                    self.position += length
                    raise self.error(error.msg) from None
            except (RecursionError, ValueError) as error:
                raise _unreadable(f"{shown(self.file)}:{line}", error) from None

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{shown(self.file)}:{self._line()}: not JSON: {problem}")

    def _line(self) -> int:
        """The line of `position`, which never moves back."""
        self._lines += self._text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._lines

    def _more(self) -> bool:
        """Reads on, at least as much as is not used up yet: a long value is not parsed too often. False at the end."""
        self._line()
        self._text, self.position, self._counted = self._text[self.position :], 0, 0
        pieces, size = [self._text], 0
        for data, read in self._content:
            self._read = read
            pieces.append(self._decode(data, pieces))
            size += len(pieces[-1])
            if size and size >= len(self._text):
                break
        else:
            pieces.append(self._decode(b"", pieces, final=True))
            size += len(pieces[-1])
        self._text = "".join(pieces)
        return size > 0

    def _decode(self, data: bytes, before: list[str], final: bool = False) -> str:
        pending = self._decoder.getstate()[0]
        try:
            text = self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            line = self._lines + sum(text.count("\n") for text in before) + (pending + data)[: error.start].count(b"\n")
            raise ValueError(f"{shown(self.file)}:{line}: not UTF-8: {error.reason}") from None
        if not self._started and text:
            self._started, text = True, text.removeprefix("\ufeff")
        return text
