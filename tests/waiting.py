"""How long a test waits for something of another process: no test is about speed."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable

# Seconds: far more than anything takes where eight other programs keep two cores busy. tests/mutants.py sets fewer.
PATIENCE = float(os.environ.get("SGTM_TESTS_PATIENCE", "1200"))


def wait_until(condition: Callable[[], bool], *processes: subprocess.Popen, every: float = 0.01) -> None:
    """Wait for `condition`, and fail where it does not come, or one of `processes` ends before."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE:.0f} s in vain"
        assert all(process.poll() is None for process in processes), "the process has ended"
        time.sleep(every)
