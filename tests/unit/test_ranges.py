"""Ranges of a trace: what a module's forward pass makes has its name, in the backward pass too, and nothing else has.

tests/processes/test_profile.py has them in a real trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sgtm.measure import ranges
from sgtm.measure.ranges import ranged


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Names of ranges in the order in which they are opened (+) and closed (-)."""
    events: list[str] = []

    class Range:
        def __init__(self, name: str):
            self.name = name

        def __enter__(self) -> None:
            events.append(f"+{self.name}")

        def __exit__(self, *error) -> None:
            events.append(f"-{self.name}")

    monkeypatch.setattr(ranges, "record_function", Range)
    return events


def test_forward_and_every_backward_node_of_its_own_are_ranges(opened):
    before = torch.ones(2, requires_grad=True)
    x = before.exp()  # of another module
    y = ranged("mlp", lambda x: x.sin() * 3)(x)
    assert opened == ["+mlp", "-mlp"]
    opened.clear()
    y.cos().sum().backward()
    assert opened == ["+mlp backward", "-mlp backward"] * 2, "of sin and mul; not of exp, cos and sum"
    assert torch.allclose(before.grad, -(y.sin() * 3 * x.cos() * x).detach())


def test_outputs_may_be_several_and_parameters_have_no_range(opened):
    weight = torch.ones(2, requires_grad=True)
    a, b, count = ranged("norm", lambda: (weight * 2, weight + 1, 5))()
    assert count == 5
    opened.clear()
    (a.sum() + b.sum()).backward()
    assert opened == ["+norm backward", "-norm backward"] * 2
    assert weight.grad.tolist() == [3.0, 3.0]


def test_the_engines_calls_are_the_phases(monkeypatch):
    within: list[str] = []

    @contextmanager
    def record(name: str) -> Iterator[None]:
        within.append(name)
        yield

    monkeypatch.setattr(ranges, "record_function", record)
    for name in ("__call__", "backward", "step"):
        monkeypatch.setattr(ranges.Engine, name, lambda self, *args, name=name: within.append(name) or args)
    engine = object.__new__(ranges.RangedEngine)
    assert engine(1) == (1,)
    engine.backward(torch.ones(()))
    engine.step(frozenset(), 0.1)
    assert within == ["forward", "__call__", "backward", "backward", "optimizer", "step"]
