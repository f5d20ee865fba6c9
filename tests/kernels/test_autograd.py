"""One definition of an op's forward and backward pass: what has a gradient, and what a caller gets."""

import pytest
import torch

from sgtm_kernels.autograd import eager
from sgtm_kernels.mlp import gelu
from sgtm_kernels.plan import MaskPlan
from sgtm_kernels.testing import FAST, assert_same_bits, random_like, random_tables


@pytest.mark.parametrize("backend", FAST)
def test_a_second_derivative_is_refused(backend):
    """The backward pass is no formula of torch's: its derivative would be silently wrong."""
    plan = MaskPlan.uniform(random_tables(1), 0, 2, 4)
    x = random_like(torch.empty(2, 4, 12), 2).requires_grad_()
    out = gelu(x, plan, (0, 4, 6, 12), backend)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def counted(returned: int):
    """`x * factor`, the sum of x, which has no gradient, and x itself, for the backward pass alone."""

    def forward(x, plan, factor):
        return x * factor, x.sum(), x.clone()

    def keep(inputs, outputs):
        _, plan, *numbers = inputs
        return outputs[2:], plan, numbers

    def backward(dy, x, plan, factor, wanted):
        assert (plan, wanted) == ("plan", (True, False, False))
        return (dy * factor,)

    return eager(forward, keep, backward, (1, returned))


def test_outputs_without_a_gradient():
    x = torch.arange(3.0).requires_grad_()
    product, total = counted(2)(x, "plan", 7.0)
    assert product.requires_grad and not total.requires_grad and total == 3
    (dx,) = torch.autograd.grad(product, x, torch.ones(3))
    assert dx.tolist() == [7.0] * 3


@pytest.mark.parametrize("returned", [1, 2])
def test_an_op_returns_the_same_where_nothing_is_recorded(returned):
    x, op = torch.arange(3.0).requires_grad_(), counted(returned)
    recorded = op(x, "plan", 7.0)
    with torch.no_grad():
        plain = op(x, "plan", 7.0)
    assert type(recorded) is type(plain) is (torch.Tensor if returned == 1 else tuple)
    for mine, wanted in zip(*([y] if returned == 1 else y for y in (plain, recorded)), strict=True):
        assert_same_bits(mine, wanted.detach())
        assert not mine.requires_grad
