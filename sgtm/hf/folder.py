"""A folder that is there with all of its files, or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_empty(out: str | Path) -> Path:
    """The folder without links. What killed processes of this host have left beside it is removed.

    Raises ValueError where it is not empty.
    """
    folder = Path(out).resolve()
    _remove_leftovers(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; export to a new one")
    return folder


@contextmanager
def filled(out: str | Path, last: str) -> Iterator[Path]:
    """A folder to write to, whose files are those of `out` when the block ends; after an error there are none.

    out   a new folder, or an empty one, through links too
    last  the file that makes `out` what it is

    An empty folder that exists is filled and not replaced: it may be the working directory of a shell or the root of a
    file system. `last` then comes last.

    Raises ValueError as `check_empty` does.
    """
    folder = check_empty(out)
    exists, moved = folder.exists(), []
    partial = Path(f"{_partial(folder)}{socket.gethostname()}-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if not exists:
            os.replace(partial, folder)
            return
        for file in sorted(partial.iterdir(), key=lambda file: file.name == last):
            moved.append(folder / file.name)
            os.replace(file, moved[-1])
        partial.rmdir()
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for file in moved:
            file.unlink(missing_ok=True)
        raise


def _partial(out: Path) -> Path:
    """What the names of folders that are not finished yet begin with; host and process follow."""
    return out / ".partial-" if out.exists() else out.with_name(f".{out.name}.partial-")


def _remove_leftovers(out: Path) -> None:
    """Of exports to `out` on this host whose processes were killed."""
    start = _partial(out)
    for folder in start.parent.glob(f"{glob.escape(start.name)}*"):
        host, _, process = folder.name.removeprefix(start.name).rpartition("-")
        if host == socket.gethostname() and process.isdigit() and not _runs(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True
