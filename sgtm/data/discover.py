"""Which files are read: those of a readable kind under the paths of the command line, each once.

A folder is searched in sorted order. Hidden names (they begin with a dot) are left out. A link is followed unless it
leads to what is read already, or to a folder that holds the link itself or a path of the command line; so no link makes
a copy of anything. Where a file has several names, the one counts that is no link, or else the first. A path of the
command line is read whatever its name is. What is passed over is counted by reason (`Account`).
"""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sgtm.data import json_records
from sgtm.data.compression import COMPRESSIONS, check_beginning, compression_of, format_of
from sgtm.data.folder import JOB
from sgtm.data.json_records import Json
from sgtm.data.readers import Source, TextFiles, shown
from sgtm.data.store import LOCK
from sgtm.data.tables import DELIMITERS, Delimited, Parquet, SavedDataset, saved_splits

FORMATS = (".txt", *json_records.SUFFIXES, *DELIMITERS)
READABLE = f"{', '.join(FORMATS)} (plain, {', '.join(COMPRESSIONS)}), .parquet or a saved Hugging Face dataset"

HIDDEN, AGAIN, ABOVE = "hidden", "read under another name", "links to a folder above"
BROKEN, SPECIAL, WRITTEN = "links to nothing", "neither file nor folder", "folders that prepare has written"
UNREAD = "of a kind that is not read"
_SHOWN = 3

Identity = tuple[int, int]


@dataclass
class Account:
    """What is read, and what is passed over. read, unread: files by kind, such as `.jsonl.gz`."""

    read: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    passed: dict[str, list[Path]] = field(default_factory=dict)
    """By reason, but for those of a kind that is not read."""

    def pass_over(self, reason: str, path: Path) -> None:
        self.passed.setdefault(reason, []).append(path)

    def add(self, other: Account) -> None:
        self.read += other.read
        self.unread += other.unread
        for reason, paths in other.passed.items():
            self.passed.setdefault(reason, []).extend(paths)

    def lines(self) -> list[str]:
        """For the terminal: what is read, then a line for each reason to pass something over."""
        lines = [f"reading {_kinds(self.read)}"]
        if self.unread:
            lines.append(f"passed over, {UNREAD}: {_kinds(self.unread)}")
        for reason, paths in self.passed.items():
            names = ", ".join(map(shown, paths[:_SHOWN])) + (", ..." if len(paths) > _SHOWN else "")
            lines.append(f"passed over, {reason}: {len(paths):,} ({names})")
        return lines


def _kinds(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common()) or "nothing"


class Sources(NamedTuple):
    sources: list[Source]
    account: Account


def open_sources(paths: Iterable[str | Path]) -> list[Source]:
    """The sources of `find_sources`."""
    return find_sources(paths).sources


def find_sources(paths: Iterable[str | Path]) -> Sources:
    """Finds what can be read under these files and folders, in the order given, folders in sorted order.

    Raises ValueError for a path that does not exist, a file of unknown format or of another than its name states, or a
    folder with nothing readable.
    """
    arguments = [str(path) for path in paths]
    if remote := next((argument for argument in arguments if re.match(r"\w+://", argument)), None):
        raise ValueError(f"{remote} is a URL, but DATA takes local files and folders; download it")
    inputs = [Path(argument) for argument in arguments]
    for path in inputs:
        if not path.exists():
            raise ValueError(f"no such file or folder: {shown(path)}")
        if not path.is_dir() and not path.is_file():
            raise ValueError(f"{shown(path)} is neither file nor folder; input is read twice, so write it to a file")
        if path.is_file() and not _kind(path):
            raise ValueError(f"cannot read {shown(path)}: expected {READABLE}")
    names, account = _Names(inputs), Account()
    sources: list[Source] = []
    for path in inputs:
        own = Account()
        sources += (new := list(_Search(names, own).sources(path)))
        if not sources or not (new or own.passed.get(AGAIN)):
            passed = "".join(f"\n  {line}" for line in own.lines()[1:])
            raise ValueError(f"nothing to read in {shown(path)}: expected {READABLE}{passed}")
        account.add(own)
    return Sources(sources, account)


class _Names:
    """The one name under which each file and folder is read; `above`: the folders that hold the named paths."""

    def __init__(self, paths: list[Path]):
        self._names: dict[Identity, Path] = {}
        self._links: deque[Path] = deque()
        self._above = {_identity(parent) for path in paths for parent in path.resolve().parents}
        for path in paths:
            self._visit(path)
        while self._links:
            link = self._links.popleft()
            if link.exists() and not self.leads_above(link):
                self._visit(link)

    def take(self, path: Path) -> bool:
        """Whether this is the name that counts; at the first call only."""
        if self._names.get(_identity(path)) != path:
            return False
        self._names[_identity(path)] = Path()
        return True

    def leads_above(self, link: Path) -> bool:
        if not link.is_symlink() or not link.is_dir():
            return False
        identity, folder = _identity(link), link.parent.resolve()
        return identity in self._above or any(identity == _identity(above) for above in (folder, *folder.parents))

    def _visit(self, path: Path) -> None:
        if not path.is_dir():
            if path.is_file() and _kind(path):
                self._names.setdefault(_identity(path), path)
        elif not _is_written(path) and self._names.setdefault(_identity(path), path) == path:
            for child in _members(path):
                (self._links.append if child.is_symlink() else self._visit)(child)


class _Search:
    def __init__(self, names: _Names, account: Account):
        self.names, self.account = names, account

    def sources(self, path: Path) -> Iterator[Source]:
        if _is_written(path):
            self.account.pass_over(WRITTEN, path)
        elif path.is_dir():
            if self._is_new(path):
                yield from self._folder(path)
        elif self._is_new(path):
            yield self._file(path)

    def _is_new(self, path: Path) -> bool:
        if self.names.take(path):
            return True
        self.account.pass_over(ABOVE if self.names.leads_above(path) else AGAIN, path)
        return False

    def _folder(self, path: Path) -> Iterator[Source]:
        if parts := _saved_parts(path):
            for split, folder in parts.items():
                if folder == path or self._is_new(folder):
                    self.account.read["saved dataset"] += 1
                    yield SavedDataset(folder, split)
            return
        texts: list[Path] = []
        others: list[Path] = []
        for child in sorted(path.iterdir()):
            if child.name.startswith("."):
                self.account.pass_over(HIDDEN, child)
            elif self._is_readable(child):
                is_text = format_of(child.name) == ".txt" and child.is_file()
                (texts if is_text else others).append(child)
        if new := [child for child in texts if self._is_new(child)]:
            self.account.read.update(map(_kind, new))
            yield TextFiles(new)
        for child in others:
            yield from self.sources(child)

    def _is_readable(self, path: Path) -> bool:
        if not path.exists():
            self.account.pass_over(BROKEN, path)
        elif path.is_dir() or (path.is_file() and _kind(path)):
            return True
        elif not path.is_file():
            self.account.pass_over(SPECIAL, path)
        else:
            suffix = "".join(path.suffixes[-2:]) if compression_of(path.name) else path.suffix
            self.account.unread[suffix or "without a suffix"] += 1
        return False

    def _file(self, path: Path) -> Source:
        self.account.read[_kind(path)] += 1
        form = format_of(path.name)
        if form == ".parquet":
            return Parquet(path)
        if form == ".txt":
            return TextFiles([path])
        with path.open("rb") as handle:
            check_beginning(path, handle.read(64))
        return Delimited(path, DELIMITERS[form]) if form in DELIMITERS else Json(path)


def _members(folder: Path) -> list[Path]:
    """What is in a folder and not hidden; of a saved dataset its parts."""
    if parts := _saved_parts(folder):
        return [part for part in parts.values() if part != folder]
    return sorted(child for child in folder.iterdir() if not child.name.startswith("."))


def _is_written(folder: Path) -> bool:
    return (folder / JOB).is_file() and (folder / LOCK).is_file()


def _saved_parts(folder: Path) -> dict[str | None, Path] | None:
    """Folder of each split of a saved `DatasetDict`; the folder itself of a `Dataset`; None of any other folder."""
    if (folder / "dataset_dict.json").is_file():
        return {split: folder / split for split in saved_splits(folder / "dataset_dict.json")}
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return {None: folder}
    return None


def _kind(path: Path) -> str:
    """Format and compression of a file that is read, such as `.jsonl.gz`; empty of any other."""
    form, compression = format_of(path.name), compression_of(path.name)
    if form in FORMATS or (form == ".parquet" and not compression):
        return form + (path.suffix.lower() if compression else "")
    return ""


def _identity(path: Path) -> Identity:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino
