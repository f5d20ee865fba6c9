"""Wall time, CPU time and memory of training steps, in rounds in which every step takes its turn."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from sgtm_kernels.measurement import peak_growth

Name = TypeVar("Name", bound=Hashable)
Value = TypeVar("Value")

LEAST = 3  # rounds, whatever the time limit
PEAKS = 5  # rounds of memory on a CPU, where other allocations of the process count too


class Took(NamedTuple):
    """Seconds of one step: wall time until its work is done, and user + system time of its process.

    With a GPU the CPU time ends where the step's work is queued: waiting for a GPU spins, and would count as work.
    """

    wall: float
    cpu: float


class TimedStep(Protocol):
    """One kind of training step."""

    def step(self) -> Took:
        """Take it once."""

    def peak(self) -> float:
        """MiB by which memory grows at most during a step."""


@dataclass(frozen=True)
class LocalStep:
    """A step of this process; `call` takes it."""

    call: Callable[[], object]

    def step(self) -> Took:
        wait_for_device()
        wall, cpu = time.perf_counter(), time.process_time()
        self.call()
        cpu = time.process_time() - cpu
        wait_for_device()
        return Took(time.perf_counter() - wall, cpu)

    def peak(self) -> float:
        return peak_growth(self.call)


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Sample:
    """One kind of step over the rounds: seconds [rounds] of wall and CPU time, tokens of a step, memory in MiB."""

    wall: np.ndarray
    cpu: np.ndarray
    tokens: float
    peak: float

    @staticmethod
    def mean(weights: list[float], samples: list[Sample]) -> Sample:
        """Steps taken in these proportions; memory is that of the largest."""
        pairs = list(zip(weights, samples, strict=True))
        return Sample(
            sum((weight * sample.wall for weight, sample in pairs), start=np.zeros_like(samples[0].wall)),
            sum((weight * sample.cpu for weight, sample in pairs), start=np.zeros_like(samples[0].cpu)),
            sum(weight * sample.tokens for weight, sample in pairs),
            max(sample.peak for sample in samples),
        )


@dataclass
class Rounds(Generic[Name]):
    """`took` by name of the step, an item for each round; `failed`: the error of steps that could not be taken."""

    took: dict[Name, list[Took]] = field(default_factory=dict)
    peaks: dict[Name, list[float]] = field(default_factory=dict)
    failed: dict[Name, str] = field(default_factory=dict)

    def sample(self, name: Name, tokens: float) -> Sample:
        wall, cpu = np.array(self.took[name]).T
        return Sample(wall, cpu, tokens, float(np.median(self.peaks.get(name, [0.0]))))


def take_rounds(
    steps: Mapping[Name, TimedStep],
    rounds: int,
    seconds: float = float("inf"),
    may_fail: Collection[Name] = (),
    warm_up: int = 1,
) -> Rounds[Name]:
    """Every step once a round, after `warm_up` first ones, in an order that changes from round to round (what ran
    before leaves its traces); fewer rounds, but at least `LEAST`, if `seconds` are over before. Then their memory.

    may_fail  names of steps whose exceptions are recorded, and that are not taken again; others raise theirs
    """
    measured: Rounds[Name] = Rounds()
    for _ in range(warm_up):
        for name in steps:
            _attempt(measured, name, steps[name].step, may_fail)
    order, until = random.Random(0), time.monotonic() + seconds
    measured.took = {name: [] for name in steps}
    for done in range(rounds):
        if done >= LEAST and time.monotonic() > until:
            break
        for name in order.sample(list(steps), len(steps)):
            _attempt(measured, name, steps[name].step, may_fail, measured.took[name])
    measured.peaks = {name: [] for name in steps}
    for _ in range(1 if torch.cuda.is_available() else min(rounds, PEAKS)):
        for name in steps:
            _attempt(measured, name, steps[name].peak, may_fail, measured.peaks[name])
    return measured


def _attempt(
    measured: Rounds[Name],
    name: Name,
    take: Callable[[], Value],
    may_fail: Collection[Name],
    into: list[Value] | None = None,
) -> None:
    if name in measured.failed:
        return
    try:
        value = take()
    except Exception as error:
        if name not in may_fail:
            raise
        measured.failed[name] = described(error)
        release_memory()  # after an out-of-memory error
    else:
        if into is not None:
            into.append(value)


def described(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def release_memory() -> None:
    """Free what nothing refers to; compiled models are in reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
