"""The process that ends a rank whose interpreter is held, and not one that was suspended."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist
from waiting import wait_until

from sgtm.config.sections import DistributedConfig
from sgtm.distributed import process_group, watchdog
from sgtm.distributed.guard import BEAT, Silence, _is_stopped


def test_a_gap_counts_as_a_few_beats_and_a_beat_ends_the_silence():
    silence = Silence(100.0)
    assert silence.add(101.0, False, False) == 1.0
    assert silence.add(101.0 + 86400, False, False) == 1.0 + 5 * BEAT, "suspended for a day"
    assert silence.add(86402.0, False, True) == 1.0 + 5 * BEAT, "the rank alone is stopped"
    assert silence.add(86403.0, True, False) == 0.0


def test_a_stopped_process_is_recognized():
    with subprocess.Popen(["sleep", "3000"]) as process:
        try:
            assert not _is_stopped(process.pid)
            process.send_signal(signal.SIGSTOP)
            wait_until(lambda: _is_stopped(process.pid))
        finally:
            process.kill()


HELD = """
import ctypes, faulthandler, os, sys
from guard import Guard
faulthandler.enable()
guard = Guard(0.5)
guard.beat()
print(guard.process.pid, flush=True)
"""


def run(last: str) -> tuple[int, int, str]:
    """Status of a rank with a guard of half a second, the guard's process, and stderr."""
    folder = Path(sys.modules[Silence.__module__].__file__).parent  # without torch, which the package imports
    done = subprocess.run([sys.executable, "-c", HELD + last], cwd=folder, capture_output=True, text=True)
    return done.returncode, int(done.stdout), done.stderr


def test_a_rank_whose_interpreter_is_held_shows_where():
    status, _, errors = run("ctypes.PyDLL(None).sleep(600)")
    assert status == -signal.SIGABRT
    assert errors.startswith("error: process ") and "Fatal Python error: Aborted" in errors


@pytest.mark.parametrize("end", ["guard.leave()", "os._exit(0)"])
def test_the_guard_ends_with_its_rank(end: str):
    status, guard, errors = run(end)
    assert (status, errors) == (0, "")
    with suppress(psutil.NoSuchProcess):
        wait_until(lambda: psutil.Process(guard).status() == psutil.STATUS_ZOMBIE)


def test_collectives_wait_for_the_watchdog_where_there_is_one(monkeypatch):
    limits = []
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", lambda timeout, group: limits.append(timeout))
    monkeypatch.setattr(dist.distributed_c10d, "_world", SimpleNamespace(pg_map={"a group": None}))
    distributed = DistributedConfig(timeout_minutes=30)
    monkeypatch.setattr(watchdog, "_watchdog", None)
    process_group.outlast_watchdog(distributed)
    monkeypatch.setattr(watchdog, "_watchdog", object())
    process_group.outlast_watchdog(distributed)
    assert limits[0] == timedelta(minutes=31) and limits[1] > timedelta(days=365)
