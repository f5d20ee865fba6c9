"""The optimizer over segments: which it updates, with which counts, and what a step costs the host."""

from __future__ import annotations

import sys
from copy import deepcopy

import pytest
import torch
from triton.runtime.jit import KernelInterface

from sgtm.config.schema import OptimizerConfig
from sgtm.distributed.optim import Segment, SegmentedAdamW
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
            tensors = (tensor.detach(), made.state[tensor]["exp_avg"], made.state[tensor]["exp_avg_sq"])
            assert all(map(torch.equal, tensors, values)), (number, live)
        assert made.steps == counts


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_of_one_owner_can_have_rates_of_their_own(backend):
    """Bit for bit those of an optimizer whose learning rate is the multiple; a factor of 1 is none."""
    rates = {"a": 1.0, "b": 0.5, "c": 2.0}
    made, *others = (optimizer(backend) for _ in range(4))
    made.set_segments(made.tables, KEYS, rates=rates)
    for number in range(3):
        for each, lr in zip((made, *others), (1e-2, 1e-2, 5e-3, 2e-2), strict=True):
            gradients(each, number)
            each.begin_step(frozenset(KEYS if number else "ac"), lr)
            each.step()
    for tensor, *equals in zip(made.tables, *(other.tables for other in others), strict=True):
        for start, end, key, _ in made.tables[tensor]:
            same = [torch.equal(tensor[start:end], other[start:end]) for other in equals]
            assert same == [key == "a", key == "b", key == "c"], key


def test_launches_of_many_owners_are_kept():
    """A step with an owner for each key makes no launch that an earlier step made."""
    keys = [f"mlp_in.{number}" for number in range(100)]
    tensor = torch.nn.Parameter(torch.zeros(100))
    made = SegmentedAdamW([tensor], CONFIG, "torch")
    segments = [Segment(number, number + 1, key, True) for number, key in enumerate(keys)]
    made.set_segments({tensor: segments}, keys, {key: number for number, key in enumerate(keys)})
    for number in range(4):
        gradients(made, number)
        made.begin_step(frozenset(keys if number % 2 else keys[:50]), 1e-2)
        made.step()
        if number == 1:
            launches = dict(made._prepared)
    assert made._prepared == launches


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
            call_count = calls_of(made.step)
        calls.append(call_count)
    assert calls[0] == calls[1] < 300


@pytest.mark.parametrize(("backend", "limit"), [("torch", 10), ("triton", 10)])
def test_a_step_costs_the_host_little_for_each_tensor(backend, limit, monkeypatch):
    """Where every weight is a tensor of its own, as under ZeRO 0 in fp32, with a new gradient in every step."""
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: lambda *args, **kwargs: None)
    calls = []
    for count in (20, 120):
        tensors = [torch.nn.Parameter(torch.zeros(12)) for _ in range(count)]
        made = SegmentedAdamW(tensors, CONFIG, backend)
        made.set_segments({t: [Segment(0, 8, "a", True), Segment(8, 12, "b", True)] for t in tensors}, KEYS)
        for number in range(3):  # the first one makes the launch
            gradients(made, number)
            made.begin_step(frozenset(KEYS), 1e-2)
            call_count = calls_of(made.step)
        calls.append(call_count)
    assert (calls[1] - calls[0]) / 100 <= limit


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_of_a_loaded_state_are_those_that_are_updated(backend):
    made = optimizer(backend)
    for number in range(2):
        gradients(made, number)
        made.begin_step(frozenset(KEYS), 1e-2)
        made.step()
    made.load_state_dict(deepcopy(made.state_dict()))
    before = {tensor: made.state[tensor]["exp_avg"].clone() for tensor in made.tables}
    gradients(made, 2)
    made.begin_step(frozenset(KEYS), 1e-2)
    made.step()
    assert not any(torch.equal(before[tensor], made.state[tensor]["exp_avg"]) for tensor in made.tables)


def test_squares_are_of_the_gradient_before_the_factor():
    made = optimizer("torch")
    gradients(made, 0)
    made.begin_step(frozenset({"b"}), 1e-2, measure=True)
    expected = dict.fromkeys(KEYS, 0.0)
    for tensor, table in made.tables.items():
        for start, end, key, _ in table:
            expected[key] += float(tensor.grad[start:end].double().square().sum())
    made.factors = [0.5]
    made.step()
    assert made.squares.tolist() == pytest.approx(list(expected.values()), rel=1e-6)
