"""The norm that ranks agree on, alone; tests/dist/test_takeover.py has what they send for it."""

from __future__ import annotations

import math

import pytest
import torch

from sgtm.distributed.agreement import Agreement


def agreement() -> Agreement:
    return Agreement(torch.device("cpu"), ranks=1)


def test_norm_of_a_large_gradient():
    """Twenty million elements alike in size: a sum in fp32, one by one, no longer sees all of the last ones."""
    gradient = torch.linspace(1.0, 1.5, 20_000_000)
    expected = gradient.double().norm().item()
    assert agreement().reach([gradient[:5], gradient[5:].view(-1, 5)]) == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30])
def test_what_is_not_finite(value):
    """1e30 is finite, but its square is not in fp32: the step is skipped as it is by torch's own clipping."""
    agreed = agreement()
    assert agreed.reach([torch.ones(10), torch.tensor([1.0, value])]) == math.inf
    assert not agreed.finite and agreed.norm == math.inf
    assert agreed.reach([torch.ones(4)]) == agreed.norm == 2.0 and agreed.finite


def test_stop_flag():
    agreed = agreement()
    for expected in (False, True, False):
        agreed.stop = lambda expected=expected: expected
        agreed.reach([torch.ones(1)])
        assert agreed.stopping == expected
    agreed.reach([torch.ones(1)], flags=torch.tensor([2.0]))
    assert agreed.stopping


def test_a_rank_without_a_share_of_several_owners():
    agreed = Agreement(torch.device("cpu"), ranks=1, owners=3)
    assert agreed.reach([], owners=[]) == 0.0 and agreed.norms == [0.0, 0.0, 0.0]
    assert agreed.reach([torch.ones(4), torch.ones(9), torch.ones(16)], owners=[2, 0, 0]) == pytest.approx(29**0.5)
    assert agreed.norms == [5.0, 0.0, 2.0]
    agreed.reach([torch.ones(4), torch.tensor([math.nan])], owners=[0, 1])
    assert agreed.norms == [2.0, math.inf, 0.0] and not agreed.finite
