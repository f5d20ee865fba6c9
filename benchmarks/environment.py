"""Where the committed results are, whether the device answers, and `sgtm_kernels` found beside this folder where it is
not installed."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import torch

from sgtm_kernels.measurement import environment, percentiles, read_rows, write_rows

__all__ = ["RESULTS", "environment", "healthy", "percentiles", "read_rows", "write_rows"]

RESULTS = Path(__file__).parent / "results"


def healthy() -> bool:
    """Free unused memory; False if the device does not respond, as after an illegal access."""
    gc.collect()
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
