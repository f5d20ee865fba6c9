"""Stage `profile`: three unmasked training steps under torch.profiler, and what the GPU did.

    profile_step.py ROWS [--cpu] [--shape 254m]

A row is a backend: the share of time in which the GPU was busy, its longest gaps with the kernels around them, and the
kernels that took most of it. On a CPU the row has the CPU's operators instead.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from device import device_of, healthy
from journal import Items, Journal
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sgtm_kernels.dispatch import unusable

import torch  # isort: skip

STEPS, WARM_UP, GAPS, KERNELS = 3, 2, 10, 20


class Span(NamedTuple):
    """A kernel (or copy) on the GPU, in microseconds."""

    name: str
    start: float
    end: float


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--shape", default="254m")
    args = parser.parse_args()
    on, items = device_of(args.cpu), Items(Journal(args.rows), healthy)
    for backend in ("triton", "torch"):
        if problem := unusable(backend, torch.bfloat16):
            print(f"left out: {backend}: {problem}")
            continue
        item = f"{args.shape}, {backend}"
        if item not in items.finished:
            items.measure(item, lambda b=backend: [{"shape": args.shape, "backend": b} | profiled(b, args.shape, on)])
    return 0


def unmasked_step(backend: str, shape: str, on: torch.device) -> Callable[[], None]:
    """A training step of strategy `none` as steps.py times it."""
    from sgtm.measure.bare import Ours
    from sgtm.measure.cases import NONE, cases, random_batches
    from sgtm.measure.models import SETTINGS

    torch.manual_seed(0)
    setting = SETTINGS[shape]()
    ours, case = Ours(setting, on, torch.bfloat16), cases(setting)[NONE]
    batches = random_batches(case.batches, setting.model, torch.device("cpu"))
    return lambda: ours.step(backend, case.tables, batches)


def profiled(backend: str, shape: str, on: torch.device) -> dict:
    step = unmasked_step(backend, shape, on)
    for _ in range(WARM_UP):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (on.type == "cuda")
    _wait(on)
    began = time.perf_counter()
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(STEPS):
            step()
        _wait(on)
    wall = 1e6 * (time.perf_counter() - began)
    kind = DeviceType.CUDA if on.type == "cuda" else DeviceType.CPU
    spans = [
        Span(e.name, e.time_range.start, e.time_range.end)
        for e in profiler.events()
        # A named range, such as that of an optimizer's step, lies on the GPU from its first kernel to its last.
        if e.device_type == kind and not e.is_user_annotation and (on.type == "cuda" or e.cpu_parent is None)
    ]
    return {"device_of_spans": on.type, "steps": STEPS, "wall_ms": round(wall / 1e3, 3)} | summary(spans, STEPS)


def _wait(on: torch.device) -> None:
    if on.type == "cuda":
        torch.cuda.synchronize()


def summary(spans: Sequence[Span], steps: int) -> dict:
    """Share of the time from the first span's start to the last one's end in which some span ran; the longest gaps;
    spans by name, those that took most of the time first. Times are of one step, in milliseconds; gaps as they were."""
    if not spans:
        raise RuntimeError("the profiler saw nothing on this device")
    ordered = sorted(spans, key=lambda span: span.start)
    busy, gaps, last = 0.0, [], ordered[0]._replace(end=ordered[0].start)
    for span in ordered:
        if span.start > last.end:
            gaps.append((span.start - last.end, last.name, span.name))
        busy += max(0.0, span.end - max(span.start, last.end))
        if span.end > last.end or span is ordered[0]:
            last = span
    total = last.end - ordered[0].start
    by_name: dict[str, list[float]] = {}
    for span in ordered:
        by_name.setdefault(span.name, []).append(span.end - span.start)
    top = sorted(by_name.items(), key=lambda entry: -sum(entry[1]))[:KERNELS]
    taken = sum(sum(times) for times in by_name.values())
    return {
        "busy_share": round(busy / total, 4) if total else 1.0,
        "milliseconds": round(total / steps / 1e3, 3),
        "launches": round(len(ordered) / steps, 1),
        "gaps": [
            {"ms": round(gap / 1e3, 4), "after": after[:120], "before": before[:120]}
            for gap, after, before in sorted(gaps, reverse=True)[:GAPS]
        ],
        "kernels": [
            {"name": name[:160], "ms": round(sum(times) / steps / 1e3, 4), "calls": round(len(times) / steps, 1),
             "share": round(sum(times) / taken, 4) if taken else 0.0}
            for name, times in top
        ],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
