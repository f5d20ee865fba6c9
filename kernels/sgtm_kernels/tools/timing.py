"""Time of single calls, in rounds in which every way of doing a thing takes its turn."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import torch

Way = Callable[[], object]  # one way of doing a thing: called once, it has done it once


class Clock:
    """Seconds of single calls. On CUDA between two events, with the L2 cache overwritten before, and with the GPU held
    back until all of the call's kernels are queued, as they are in a training step."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            self.cache = torch.empty(2**28, dtype=torch.int8, device=device)

    def seconds(self, way: Way) -> float:
        if not self.cuda:
            began = time.perf_counter()
            way()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        torch.cuda._sleep(5_000_000)  # cycles: some 3 ms
        start.record()
        way()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def rounds(self, ways: Mapping[str, Way], rounds: int, seconds: float) -> dict[str, list[float]]:
        """Times of every way, each once a round, in an order that changes from round to round (what ran before leaves
        its traces); fewer rounds, but at least three, where `seconds` are over before."""
        for way in ways.values():
            for _ in range(2):
                way()
        times: dict[str, list[float]] = {name: [] for name in ways}
        order, until = random.Random(0), time.monotonic() + seconds
        for done in range(rounds):
            if done >= 3 and time.monotonic() > until:
                break
            for name in order.sample(list(ways), len(ways)):
                times[name].append(self.seconds(ways[name]))
        return times
