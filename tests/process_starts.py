"""What happens where a test starts a process, in place of it."""

from __future__ import annotations

import multiprocessing.process
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def process_starts(action: Callable[..., None]) -> Iterator[None]:
    """Call `action` for every start of a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", action)
        patch.setattr(multiprocessing.process.BaseProcess, "start", action)
        yield
