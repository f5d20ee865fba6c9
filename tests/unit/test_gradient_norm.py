"""The norm that ranks agree on, alone; tests/dist/test_takeover.py has what they send for it."""

from __future__ import annotations

import math

import pytest
import torch

from sgtm.distributed.gradient_norm import GradientNorm


def gradient_norm() -> GradientNorm:
    return GradientNorm(torch.device("cpu"), ranks=1)


def test_norm_of_a_large_gradient():
    """Twenty million elements alike in size: a sum in fp32, one by one, no longer sees all of the last ones."""
    gradient = torch.linspace(1.0, 1.5, 20_000_000)
    expected = gradient.double().norm().item()
    assert gradient_norm().reduce([gradient[:5], gradient[5:].view(-1, 5)]) == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30])
def test_what_is_not_finite(value):
    """1e30 is finite, but its square is not in fp32: the step is skipped as it is by torch's own clipping."""
    norm = gradient_norm()
    assert norm.reduce([torch.ones(10), torch.tensor([1.0, value])]) == math.inf
    assert not norm.finite and norm.norm == math.inf
    assert norm.reduce([torch.ones(4)]) == norm.norm == 2.0 and norm.finite


def test_stop_flag():
    norm = gradient_norm()
    for expected in (False, True, False):
        norm.stop = lambda expected=expected: expected
        norm.reduce([torch.ones(1)])
        assert norm.stopping == expected
    norm.reduce([torch.ones(1)], flags=torch.tensor([2.0]))
    assert norm.stopping


def test_a_rank_without_a_share_of_several_owners():
    norm = GradientNorm(torch.device("cpu"), ranks=1, owners=3)
    assert norm.reduce([], owners=[]) == 0.0 and norm.norms == [0.0, 0.0, 0.0]
    assert norm.reduce([torch.ones(4), torch.ones(9), torch.ones(16)], owners=[2, 0, 0]) == pytest.approx(29**0.5)
    assert norm.norms == [5.0, 0.0, 2.0]
    norm.reduce([torch.ones(4), torch.tensor([math.nan])], owners=[0, 1])
    assert norm.norms == [2.0, math.inf, 0.0] and not norm.finite
