"""What happens where a test starts a process, in place of it.

Python reports starts to audit hooks, of which none can be removed again: ours does nothing outside `process_starts`.
`multiprocessing` reports none under `spawn`, and the `Popen` of warm.py has a server fork.
"""

from __future__ import annotations

import multiprocessing.process
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

STARTS = {"os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen"}
_actions: list[Callable[..., None]] = []


def _watch(event: str, args: tuple) -> None:
    if _actions and event in STARTS:
        _actions[-1]()


sys.addaudithook(_watch)


@contextmanager
def process_starts(action: Callable[..., None]) -> Iterator[None]:
    """Call `action`, which raises, for every start of a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", action)
        patch.setattr(multiprocessing.process.BaseProcess, "start", action)
        _actions.append(action)
        try:
            yield
        finally:
            _actions.remove(action)
