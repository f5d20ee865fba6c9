"""Stage `rates`: peak rates of the device, a copy in GB/s and a large matmul in TFLOP/s.

rates.py ROWS [--cpu] [--seconds S]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from device import device_of, healthy
from journal import Items, Journal
from roofline import COPY, MATMUL, Roofline

from sgtm_kernels.measurement import percentiles
from sgtm_kernels.tools.timing import Clock

import torch  # isort: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each rate")
    args = parser.parse_args()
    on = device_of(args.cpu)
    items, roofline, clock = Items(Journal(args.rows), healthy), Roofline(on, torch.bfloat16), Clock(on)

    def rate(name: str, unit: str, work: float) -> list[dict]:
        times = clock.rounds({name: roofline.calls[name]}, 30, args.seconds)[name]
        return [{"rate": name, unit: percentiles([work / t for t in times]), "rounds": len(times)}]

    items.measure(COPY, lambda: rate(COPY, "gb_per_second", roofline.bytes / 1e9))
    items.measure(MATMUL, lambda: rate(MATMUL, "tflops", roofline.flops / 1e12))
    return 0


if __name__ == "__main__":
    sys.exit(main())
