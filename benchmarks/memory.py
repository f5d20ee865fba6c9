"""Peak memory of a step, of this process."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch


def peak_growth(step: Callable[[], object]) -> float:
    """MiB by which memory grows at most during a step: the process's, or the CUDA allocator's."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, or the step would grow into it unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark VmHWM (Linux)
    before = _status_mib("VmRSS")
    step()
    return _status_mib("VmHWM") - before


def _status_mib(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024
