"""Time by kernel and by range, from a trace of torch.profiler (Chrome's format).

On a GPU the time is that of kernels and copies on the device. A kernel belongs to the phase that its launch falls into,
on whatever thread, because the backward pass has threads of its own, and to the innermost module range around the
launch on the same thread. On a CPU the "kernels" are ATen ops and autograd nodes by self time: without the ops that
they call.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sgtm.measure.ranges import MODULES, OF_BACKWARD, PHASES

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
OTHER = "other"


class Work(NamedTuple):
    """One call of a kernel; `microseconds` is its own time."""

    name: str
    phase: str
    module: str
    microseconds: float


def summarize(events: list[dict], steps: int, seconds: float, on_gpu: bool) -> dict:
    """Time by kernel and by range; `summary.json` of `sgtm profile`.

    steps, seconds  what the trace covers, and the wall-clock time that it took

    Raises ValueError where there is no kernel in the trace of a GPU.
    """
    work = list(device_work(events) if on_gpu else cpu_work(events))
    total = sum(item.microseconds for item in work)
    if not total:
        raise ValueError("the trace has no kernel: the profiler does not see this GPU (CUPTI; see sgtm doctor)")
    return {
        "steps": steps,
        "ms_per_step": 1000 * seconds / steps,
        "kernel_ms_per_step": total / 1000 / steps,
        "kernel": "kernels and copies on the GPU" if on_gpu else "self time of ops on the CPU",
        "kernels": _table(work, ("name",), steps, total),
        "ranges": _table(work, ("phase", "module"), steps, total),
    }


def _table(work: list[Work], keys: tuple[str, ...], steps: int, total: float) -> list[dict]:
    """Calls, milliseconds and share of each, the longest first; calls and milliseconds per step."""
    sums: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0, 0.0])
    for item in work:
        entry = sums[tuple(getattr(item, key) for key in keys)]
        entry[0] += 1
        entry[1] += item.microseconds
    rows = [
        dict(zip(keys, names, strict=True))
        | {"calls_per_step": calls / steps, "ms_per_step": time / 1000 / steps, "share": time / total}
        for names, (calls, time) in sums.items()
    ]
    return sorted(rows, key=lambda row: -row["ms_per_step"])


def device_work(events: list[dict]) -> Iterator[Work]:
    """Every kernel and copy, in the ranges of its launch; `other` where that is not in the trace."""
    phases = _Phases(events)
    modules = {}
    for thread in _threads(events, ("user_annotation", *LAUNCHES)):
        for event, around in _nested(thread):
            if event["cat"] in LAUNCHES:
                modules[event["args"].get("correlation")] = event["ts"], _module(around)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in DEVICE:
            launched, module = modules.get(event["args"].get("correlation"), (None, OTHER))
            yield Work(event["name"], OTHER if launched is None else phases.phase_of(launched), module, event["dur"])


def cpu_work(events: list[dict]) -> Iterator[Work]:
    """Every op, in the ranges around it."""
    phases = _Phases(events)
    for thread in _threads(events, ("user_annotation", "cpu_op")):
        calls = [(event, around) for event, around in _nested(thread) if event["cat"] == "cpu_op"]
        own = {id(event): event["dur"] for event, _ in calls}
        for event, around in calls:
            caller = next((e for e in reversed(around) if e["cat"] == "cpu_op"), None)
            if caller is not None:
                own[id(caller)] -= event["dur"]
        for event, around in calls:
            yield Work(event["name"], phases.phase_of(event["ts"]), _module(around), max(own[id(event)], 0.0))


class _Phases:
    """Which phase of a step a time lies in: they follow one another on the main thread."""

    def __init__(self, events: list[dict]):
        phases = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in PHASES]
        self.ranges = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in phases)
        self.starts = [start for start, _, _ in self.ranges]

    def phase_of(self, time: float) -> str:
        index = bisect_right(self.starts, time) - 1
        return self.ranges[index][2] if index >= 0 and time < self.ranges[index][1] else OTHER


def _threads(events: list[dict], categories: tuple[str, ...]) -> Iterable[list[dict]]:
    """Events of these categories by thread, each before what lies within it."""
    threads = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in categories:
            threads[event["pid"], event["tid"]].append(event)
    for thread in threads.values():
        yield sorted(thread, key=lambda e: (e["ts"], -e["dur"]))


def _nested(thread: list[dict]) -> Iterator[tuple[dict, list[dict]]]:
    """Each event with those around it, the innermost last."""
    around: list[dict] = []
    for event in thread:
        while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
            around.pop()
        yield event, list(around)
        around.append(event)


def _module(around: list[dict]) -> str:
    names = (e["name"].removesuffix(OF_BACKWARD) for e in reversed(around) if e["cat"] == "user_annotation")
    return next((name for name in names if name in MODULES), OTHER)
