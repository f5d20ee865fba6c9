"""Where the committed results are, and `sgtm_kernels` found beside this folder where it is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from sgtm_kernels.measurement import environment, percentiles, read_rows, write_rows

__all__ = ["RESULTS", "environment", "percentiles", "read_rows", "write_rows"]

RESULTS = Path(__file__).parent / "results"
