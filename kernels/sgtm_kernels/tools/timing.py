"""Time of single calls, in rounds in which every call takes its turn."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import torch

TimedCall = Callable[[], object]  # does once what is timed


class Clock:
    """Seconds of single calls. On CUDA between two events, with the L2 cache overwritten before, and with the GPU held
    back until all of the call's kernels are queued, as they are in a training step."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            self.cache = torch.empty(2**28, dtype=torch.int8, device=device)

    def seconds(self, call: TimedCall) -> float:
        if not self.cuda:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        torch.cuda._sleep(5_000_000)  # cycles: some 3 ms
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def rounds(self, calls: Mapping[str, TimedCall], rounds: int, seconds: float) -> dict[str, list[float]]:
        """Times of every call, each once a round, in an order that changes from round to round (what ran before leaves
        its traces); fewer rounds, but at least three, where `seconds` are over before."""
        for call in calls.values():
            for _ in range(2):
                call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        order, until = random.Random(0), time.monotonic() + seconds
        for done in range(rounds):
            if done >= 3 and time.monotonic() > until:
                break
            for name in order.sample(list(calls), len(calls)):
                times[name].append(self.seconds(calls[name]))
        return times
