"""What the backward pass of a masked linear layer reads and writes, and in how many passes."""

import pytest
import torch
from linear_layers import BOUNDS, SIDES, by_kernel, by_side, gradients, inputs, op, use_algorithm
from torch.utils.checkpoint import checkpoint

from sgtm_kernels.linear import scaling
from sgtm_kernels.mlp import gelu
from sgtm_kernels.testing import (
    assert_same_bits,
    forward_backward,
    poisoned_memory,
    random_like,
    random_plan,
    random_tables,
    token_mask,
)
from sgtm_kernels.triton_common import tiles


@pytest.fixture(autouse=True)
def chosen_algorithm(request, monkeypatch):
    use_algorithm(request, monkeypatch)


@by_kernel
@by_side
@pytest.mark.parametrize("layout", ["sorted", "tokens"])
@pytest.mark.parametrize("groups", [(0, 1, 2), (0, 2)])
def test_masked_content_changes_nothing(groups, layout, side, backend):
    """NaN in the masked entries of the operand whose columns are the rows of dW, and at the bias, goes nowhere: where
    whole tokens are masked, and where a kernel reads the entry beside it. Nor does NaN in the other operand where
    tokens are left out; the algorithm `masked` multiplies all of them."""
    ones = random_tables(17, (1.0,))
    update = {
        part: (tuple(float(g not in groups) for g in range(3)), *table[1:]) for part, table in ones.update.items()
    }
    joint = {kind: (0.0, *table[1:]) for kind, table in ones.update_joint.items()}
    tables = type(ones)(ones.labels, ones.groups, ones.active, ones.route, update, joint)
    plan = random_plan(18, tables, layout, 10, 13)
    x, weight, bias = inputs(side, 10, 13, torch.float32)
    dy = random_like(torch.empty(10, 13, SIDES[side][3]), 0)
    tokens = token_mask(plan, [0])[..., None]
    masked = tokens & torch.tensor([any(BOUNDS[g] <= i < BOUNDS[g + 1] for g in groups) for i in range(BOUNDS[-1])])
    clean = gradients(side, plan, backend, x, weight, bias, dy)
    other = tokens & (len(groups) == 3 and (backend, layout) != ("triton", "tokens"))
    if side == "in":
        dirty_x, dirty_dy = x.masked_fill(other, torch.nan), dy.masked_fill(masked, torch.nan)
    else:
        dirty_x, dirty_dy = x.masked_fill(masked, torch.nan), dy.masked_fill(other, torch.nan)
        (db,) = bias_gradient(side, plan, backend, x, weight, bias, dy.masked_fill(tokens, torch.nan))
        torch.testing.assert_close(db, clean[1], rtol=1e-6, atol=1e-6)
    dirty = gradients(side, plan, backend, dirty_x, weight, bias, dirty_dy)
    for old, new in zip(clean, dirty, strict=True):
        assert_same_bits(new, old)


def bias_gradient(side, plan, backend, x, weight, bias, dy):
    bias = bias.clone().requires_grad_()
    return torch.autograd.grad(op(side, plan, backend)(x, weight, bias), bias, dy)


@by_kernel
@pytest.mark.parametrize("layout", ["ragged", "tokens"])
def test_a_gradient_is_written_to_only_where_it_may_be(layout, backend):
    """The same bits whether or not it is; without permission, and where it is strided, it stays as it was."""
    plan = random_plan(19, random_tables(20), layout, 10, 13)
    data = inputs("in", 10, 13, torch.float32)
    results = []
    for overwrite in (False, True):
        leaves = [x.clone().requires_grad_() for x in data]
        dy = random_like(torch.empty(10, 13, BOUNDS[-1]), 0)
        before = dy.clone()
        with poisoned_memory():
            out = op("in", plan, backend, overwrite=overwrite)(*leaves)
            results.append(torch.autograd.grad(out, leaves, dy))
        written = overwrite and layout == "tokens" and backend == "triton"
        assert torch.equal(dy, before) != written
    for old, new in zip(*results, strict=True):
        assert_same_bits(new, old)
    strided = random_like(torch.empty(13, 10, BOUNDS[-1]), 0).transpose(0, 1)
    before = strided.clone()
    leaves = [x.clone().requires_grad_() for x in data]
    torch.autograd.grad(op("in", plan, backend, overwrite=True)(*leaves), leaves, strided)
    assert torch.equal(strided, before)


@pytest.mark.parametrize("backend", ["triton"])  # `rectangles` writes to no gradient
@pytest.mark.parametrize("again", ["checkpoint", "twice"])
def test_an_overwritten_gradient_behind_an_activation(again, backend):
    """As the model uses it: recomputed under activation checkpointing, and gone through a second time."""
    plan = random_plan(21, random_tables(22), "tokens", 4, 13)
    data = inputs("in", 4, 13, torch.float32)

    def mlp(overwrite):
        return lambda *leaves: gelu(op("in", plan, backend, overwrite=overwrite)(*leaves), plan, BOUNDS, "triton")

    wanted = forward_backward(mlp(False), *data)
    leaves = [x.clone().requires_grad_() for x in data]
    if again == "checkpoint":
        out = checkpoint(mlp(True), *leaves, use_reentrant=False)
    else:
        out = mlp(True)(*leaves)
        out.backward(random_like(out, 1), retain_graph=True)
        for leaf in leaves:
            leaf.grad = None
    out.backward(random_like(out, 0))
    for new, old in zip((out, *(leaf.grad for leaf in leaves)), wanted, strict=True):
        assert_same_bits(new, old)


@by_side
@pytest.mark.parametrize("layout", ["ragged", "tokens"])
def test_one_pass_and_one_sum_for_a_layer(layout, side, monkeypatch):
    """Whatever the row ranges: one kernel for scaling and bias sums, one that adds the partial sums."""
    launched = []
    monkeypatch.setenv("SGTM_LINEAR", "masked")
    for module, name in ((scaling, "scale_and_sum"), (scaling, "scale_input_and_sum"), (tiles, "add_partial_sums")):
        monkeypatch.setattr(module, name, Counted(getattr(module, name), launched))
    plan = random_plan(11, random_tables(12), layout, 6, 9)
    forward_backward(op(side, plan, "triton"), *inputs(side, 6, 9, torch.float32))
    both = layout == "tokens" and side == "out"
    assert launched == ["scale_input_and_sum" if both else "scale_and_sum", "add_partial_sums"]


class Counted:
    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        self.launched.append(self.kernel.fn.__name__)
        return self.kernel[grid]
