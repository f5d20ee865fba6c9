"""Whether other programs take the cores from a run on a CPU, which threads that wait for one another suffer most."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

STEPS = 5
LEAST = 0.7
"""Least share of the first steps in which the main thread has a core on an idle machine."""


class ContentionWatch:
    """Compares the main thread's CPU time with the wall clock over the first steps.

    threads  of each operation; on one there is nothing to wait for
    """

    def __init__(self, threads: int):
        # Threads that sleep give their core away, and lose little to contention.
        self.on = threads > 1 and os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive"
        self.threads, self.steps, self.wall, self.cpu = threads, 0, 0.0, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step that reads no file and waits for no other process."""
        wall, cpu = time.perf_counter(), time.thread_time()
        yield
        self.wall += time.perf_counter() - wall
        self.cpu += time.thread_time() - cpu
        self.steps += 1

    def warning(self) -> str | None:
        """Once, after `STEPS` steps, if they were slowed down."""
        if not self.on or self.steps < STEPS:
            return None
        self.on = False
        share = self.cpu / self.wall
        if share >= LEAST:
            return None
        return (
            f"other programs keep the cores busy: in the first {self.steps} steps the main thread had a core for "
            f"{share:.0%} of the time, and {self.threads} threads wait for one another. Faster: "
            "OMP_WAIT_POLICY=passive, or fewer threads, OMP_NUM_THREADS=1"
        )
