"""The optimizer over segments: which it updates, with which counts, and what a step costs the host.

Faults tried, each seen to fail: the launch of another live set; the factor of the step before; a slice for every
segment in every step; counts of the keys in another order; squares after the factor.
"""

from __future__ import annotations

import sys

import pytest
import torch
from triton.runtime.jit import KernelInterface

from sgtm.config.schema import OptimizerConfig
from sgtm.train.optim import Segment, SegmentedAdamW
from sgtm_kernels.adamw import Update, adamw
from sgtm_kernels.dispatch import BACKENDS

CONFIG = OptimizerConfig()
KEYS = ("a", "b", "c")
SIZES = (70, 33)


def optimizer(backend: str, segments: int = 6) -> SegmentedAdamW:
    """Two tensors cut into segments of the keys in turn, with a gap and padding at the end of each."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.nn.Parameter(torch.randn(size * segments // 6, generator=generator)) for size in SIZES]
    made = SegmentedAdamW(tensors, CONFIG, backend)
    tables = {}
    for tensor in tensors:
        each = tensor.numel() // (segments + 1)
        starts = [number * each for number in range(segments)]
        tables[tensor] = [Segment(s, s + each - (i % 2), KEYS[i % 3], i % 3 > 0) for i, s in enumerate(starts)]
    made.set_segments(tables, KEYS)
    return made


def gradients(made: SegmentedAdamW, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for tensor in made.tables:
        tensor.grad = torch.randn(tensor.shape, generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
def test_live_segments_are_updated_with_counts_of_their_own(backend):
    """Bit for bit as one update for each segment, whatever was live in the steps between; the rest keeps its bits."""
    made, counts = optimizer(backend), dict.fromkeys(KEYS, 0)
    steps = [("abc", 1.0), ("b", 1.0), ("ab", 0.25), ("b", 0.5), ("abc", 1.0), ("", 1.0)]
    for number, (live, factor) in enumerate(steps):
        gradients(made, number)
        expected = {}
        counts.update({key: counts[key] + 1 for key in live})
        for tensor, table in made.tables.items():
            state = made.state[tensor]
            parts = (tensor.detach(), tensor.grad, state["exp_avg"], state["exp_avg_sq"])
            weight, grad, *moments = (part.clone() for part in parts)
            grad, decayed = grad * factor, CONFIG.weight_decay
            updates = [
                Update(*(t[start:end] for t in (weight, grad, *moments)), counts[key], decayed * decay)
                for start, end, key, decay in table
                if key in live
            ]
            adamw(updates, 1e-2, CONFIG.betas, CONFIG.eps, backend)
            expected[tensor] = weight, *moments
        made.begin_step(frozenset(live), 1e-2)
        if factor != 1.0:
            made.factors = [factor]
        made.step()
        for tensor, values in expected.items():
            found = (tensor.detach(), made.state[tensor]["exp_avg"], made.state[tensor]["exp_avg_sq"])
            assert all(map(torch.equal, found, values)), (number, live)
        assert made.steps == counts


def calls_of(function) -> int:
    """Calls of Python and of C while `function` runs."""
    events = []
    sys.setprofile(lambda frame, event, argument: events.append(event))
    try:
        function()
    finally:
        sys.setprofile(None)
    return sum(event in ("call", "c_call") for event in events)


def test_a_step_costs_the_host_the_same_however_many_segments_there_are(monkeypatch):
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: lambda *args, **kwargs: None)
    calls = []
    for segments in (6, 600):
        made = optimizer("triton", segments)
        gradients(made, 0)
        for _ in range(2):  # the first one makes the launch
            made.begin_step(frozenset(KEYS), 1e-2)
            found = calls_of(made.step)
        calls.append(found)
    assert calls[0] == calls[1] < 300


def test_squares_are_of_the_gradient_before_the_factor():
    made = optimizer("runs")
    gradients(made, 0)
    made.begin_step(frozenset({"b"}), 1e-2, measure=True)
    expected = dict.fromkeys(KEYS, 0.0)
    for tensor, table in made.tables.items():
        for start, end, key, _ in table:
            expected[key] += float(tensor.grad[start:end].double().square().sum())
    made.factors = [0.5]
    made.step()
    assert made.squares.tolist() == pytest.approx(list(expected.values()), rel=1e-6)
