"""The directory of a run: that one process uses it, on all nodes, and how it begins."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from sgtm.config import Config
from sgtm.config.load import save_config
from sgtm.distributed.on_ranks import on_every_rank, on_rank_zero
from sgtm.files import sync_directory, write_atomically
from sgtm.model.direction import keep_direction
from sgtm.run.checkpoint import remove_unfinished
from sgtm.run.environment import record_environment
from sgtm.run.located import record_folder
from sgtm.run.metrics import MetricsLog
from sgtm.run.usable import check_usable

VISIBLE_WITHIN = 60.0
"""Seconds that a shared file system may take to show one node what another has written."""
LEASE = 120.0
"""Seconds that it may keep the lock of a node that is gone."""


@contextmanager
def locked_run(run: Path, patience: float = 0.0) -> Iterator[None]:
    """While this lasts no other process trains the run, and all ranks see the same directory of runs.

    patience  seconds to wait for another process that does

    `.<name>.lock` beside the run directory, held by rank 0 and gone with it. A file system without locks does without.
    Every rank raises ValueError where another process holds it, or a rank sees another directory.
    """
    file = run.absolute().with_name(f".{run.name}.lock")
    locks: list[TextIO] = []
    holder = on_rank_zero(lambda: _take(file, run, patience, locks))
    try:
        on_every_rank(lambda: _check_shared(file, holder))
        yield
    finally:
        for lock in locks:
            with suppress(OSError):
                file.unlink()
            lock.close()


def _take(file: Path, run: Path, patience: float, locks: list[TextIO]) -> str:
    """Lock the file and write who has it; returns its content. The open file is put into `locks`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    end, printed = time.monotonic() + patience, False
    while True:
        lock = file.open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                lock.seek(0)
                who = lock.read().partition(" ")[2] or "another process"
                lock.close()
                if time.monotonic() >= end:
                    raise ValueError(f"{run} is being trained by {who}; wait for it, or set another --name") from None
                if not printed:
                    print(f"{run} is being trained by {who}; waiting {patience:.0f} s for it", file=sys.stderr)
                printed = True
                time.sleep(0.2)
                continue
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                break
        lock.close()  # it was deleted by the run that had it, just now
    locks.append(lock)
    holder = f"{secrets.token_hex(8)} process {os.getpid()} on {socket.gethostname()}"
    lock.truncate(0)
    lock.write(holder)
    lock.flush()
    return holder


def _check_shared(file: Path, holder: str) -> None:
    end = time.monotonic() + VISIBLE_WITHIN
    while True:
        with suppress(FileNotFoundError):
            if file.read_text() == holder:
                return
        if time.monotonic() > end:
            raise ValueError(
                f"runs: {file.parent} on {socket.gethostname()} is not the directory that rank 0 has "
                f"({holder.partition(' on ')[2]}): all nodes need the same one, on a shared file system"
            )
        time.sleep(0.1)


def begin(run: Path, config: Config, log: MetricsLog, resume: bool, overwrite: bool) -> set[int]:
    """Make the run directory and open its log; returns the steps that have been evaluated.

    An old run is renamed to `.<name>.replaced-<process>`, and deleted only once no check can fail any more.
    """
    check_usable(run, resume, overwrite)  # again: another process may have made it since
    run = run.resolve()  # of a link, what it points to is replaced
    aside = run.with_name(f".{run.name}.replaced-{os.getpid()}") if overwrite and run.exists() else None
    if aside:
        run.rename(aside)
    file, new = run / "config.yaml", not run.exists() or not any(run.iterdir())
    earlier = file.read_text("utf-8") if file.exists() else None
    try:
        run.mkdir(parents=True, exist_ok=True)
        sync_directory(run.parent)
        save_config(config, file)
        keep_direction(config, run)
        evaluated = log.open()
    except BaseException:
        if new:
            shutil.rmtree(run, ignore_errors=True)
        elif earlier is not None:
            write_atomically(file, earlier)
        if aside:
            aside.rename(run)
        raise
    record_folder(run)
    record_environment(run)
    remove_unfinished(run)
    if aside:
        shutil.rmtree(aside)
    return evaluated
