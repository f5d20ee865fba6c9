"""The last word of a rank that ends well, and what can be seen of one that ends otherwise.

tests/faults/test_lost_ranks.py has ranks that die and hang.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from waiting import wait_until

from sgtm.distributed import watchdog
from sgtm.distributed.watchdog import LEFT, Watchdog, _death


class SlowStore:
    """A store in which a beat takes until it is let go; what it holds is asked for by nobody else."""

    def __init__(self):
        self.inner, self.beating, self.go_on = dist.HashStore(), threading.Event(), threading.Event()
        self.inner.set_timeout(timedelta(seconds=5))

    def set(self, key: str, value: str) -> None:
        if value != LEFT:
            self.beating.set()
            self.go_on.wait(30)
        self.inner.set(key, value)

    def __getattr__(self, name: str):
        return getattr(self.inner, name)


def test_the_last_beat_does_not_take_back_that_a_rank_has_left(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(watchdog, "BEAT", 0.01)
    store = SlowStore()
    rank = Watchdog(store, rank=0, world_size=1, limit=60.0, neighbours={})
    try:
        assert store.beating.wait(30)
        threading.Timer(0.3, store.go_on.set).start()
        rank.leave(0)
        rank.thread.join(30)
        assert store.inner.get("0") == LEFT.encode()
    finally:
        rank.leave(0)


@pytest.mark.parametrize(
    ("code", "expected"),
    [("os.kill(os.getpid(), 9)", "killed by SIGKILL"), ("os._exit(3)", "ended with exit status 3")],
)
def test_how_a_process_has_ended_can_be_seen_until_it_is_reaped(code, expected):
    process = subprocess.Popen([sys.executable, "-c", f"import os; {code}"])
    wait_until(lambda: _death(process.pid) != "")
    assert _death(process.pid) == expected
    process.wait()
    assert _death(process.pid) == "ended with an unknown exit status"
    assert _death(os.getpid()) == ""
