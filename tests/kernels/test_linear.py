"""Masked linear layers: dW and db by label and group, everything else the plain layer's.

Faults tried, each seen to fail: a slice dropped from dW; a slice's weight ignored, in dW or db; the first or the last
token of a slice left out; a group boundary off by one row; rows nobody may update left unwritten; the token-level
branch without its weights, on either operand, or in the bias; the out side's bias under the rows' table; dX from a
masked gradient; `contribution` replaced by `update`; the slices of another part; partial sums added in bf16.
"""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from sgtm_kernels.dispatch import BACKENDS
from sgtm_kernels.linear import linear_in, linear_out
from sgtm_kernels.plan import MaskPlan, merge_runs
from sgtm_kernels.testing import (
    BINARY,
    FLOATS,
    LAYOUTS,
    assert_accurate,
    assert_same_bits,
    forward_backward,
    random_like,
    random_plan,
    random_tables,
    token_mask,
)

BOUNDS = (0, 21, 24, 40)  # 40 rows in three groups: more than columns, fewer, more
WIDTH = 12
SIDES = {"in": (linear_in, "mlp_in", WIDTH, BOUNDS[-1]), "out": (linear_out, "attn_out", BOUNDS[-1], WIDTH)}

by_side = pytest.mark.parametrize("side", SIDES)
by_layout = pytest.mark.parametrize("layout", LAYOUTS)
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def inputs(side: str, batch: int, seq_len: int, dtype=torch.float64) -> list[torch.Tensor]:
    """x, weight, bias: the same values in every dtype, exact in bf16."""
    _, _, x_width, y_width = SIDES[side]
    shapes = [(batch, seq_len, x_width), (BOUNDS[-1], WIDTH), (y_width,)]
    return [random_like(torch.empty(shape, dtype=torch.bfloat16), i).to(dtype) for i, shape in enumerate(shapes)]


def op(side: str, plan, backend: str, bounds=BOUNDS):
    function, part, *_ = SIDES[side]
    return lambda x, weight, bias=None: function(x, weight, bias, plan, part, bounds, backend)


def plain(side: str):
    return F.linear if side == "in" else lambda x, weight, bias=None: F.linear(x, weight.t(), bias)


@by_backend
@by_side
@by_layout
def test_formula_in_fp64(layout, side, backend):
    """dW is the sum over labels of the plain layer's gradient from that label's tokens, times the table's entry."""
    plan = random_plan(1, random_tables(2), layout, 9, 7)
    x, weight, bias = inputs(side, 9, 7)
    out, dx, dw, db = forward_backward(op(side, plan, backend), x, weight, bias)
    want_dw, want_db = torch.zeros_like(weight), torch.zeros_like(bias)
    dy = random_like(out, 0)
    for label in range(len(plan.tables.labels)):
        masked = dy * token_mask(plan, [label])[..., None]
        left, right = (masked, x) if side == "in" else (x, masked)
        pure = torch.einsum("bsr,bsc->rc", left, right)
        for group, (start, end) in enumerate(pairwise(BOUNDS)):
            factor = plan.tables.contribution(SIDES[side][1], label, group)
            want_dw[start:end] += factor * pure[start:end]
            if side == "in":
                want_db[start:end] += factor * masked.sum((0, 1))[start:end]
        if side == "out":
            want_db += plan.tables.update_joint["attn_out_bias"][label] * masked.sum((0, 1))
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(out, plain(side)(x, weight, bias), **close)
    torch.testing.assert_close(dx, dy @ (weight if side == "in" else weight.t()), **close)
    torch.testing.assert_close(dw, want_dw, **close)
    torch.testing.assert_close(db, want_db, **close)


@by_dtype
@by_side
@by_layout
@pytest.mark.parametrize(("batch", "seq_len"), [(1, 1), (9, 7), (10, 100)])
def test_runs_are_as_accurate_as_torch(batch, seq_len, layout, side, dtype):
    plan = random_plan(3, random_tables(4, FLOATS), layout, batch, seq_len)
    exact = forward_backward(op(side, plan, "reference"), *inputs(side, batch, seq_len))
    theirs = forward_backward(op(side, plan, "reference"), *inputs(side, batch, seq_len, dtype))
    ours = forward_backward(op(side, plan, "runs"), *inputs(side, batch, seq_len, dtype))
    theirs[3] = bias_by_matmul(side, plan, random_like(theirs[0], 0))
    for name, *values in zip(("y", "dx", "dw", "db"), ours, theirs, exact, strict=True):
        assert_accurate(*values, name=name)


def bias_by_matmul(side: str, plan, dy: torch.Tensor) -> torch.Tensor:
    """The bias gradient as torch's matmul gives it: over many runs the op is one too, five times as fast as a sum."""
    dy, labels = dy.flatten(0, 1), range(len(plan.tables.labels))
    if side == "out":
        return plan.token_weights(plan.tables.update_joint["attn_out_bias"], dy) @ dy
    weights = [tuple(plan.tables.contribution("mlp_in", label, group) for label in labels) for group in range(3)]
    columns = dy.split([end - start for start, end in pairwise(BOUNDS)], dim=1)
    return torch.cat([plan.token_weights(w, dy) @ column for w, column in zip(weights, columns, strict=True)])


@by_backend
@by_dtype
@by_side
@by_layout
def test_masked_rows_are_zero_and_dx_is_the_plain_one(layout, side, dtype, backend):
    tables = random_tables(5, BINARY)
    plan = random_plan(6, tables, layout, 10, 13)
    data = inputs(side, 10, 13, dtype)
    out, dx, dw, _ = forward_backward(op(side, plan, backend), *data)
    plain_out, plain_dx, *_ = forward_backward(plain(side), *data)
    assert_same_bits(out, plain_out, "y")
    assert_same_bits(dx, plain_dx, "dx")
    present = {run.label for run in plan.runs}
    for group, (start, end) in enumerate(pairwise(BOUNDS)):
        frozen = all(tables.contribution(SIDES[side][1], label, group) == 0 for label in present)
        assert bool((dw[start:end] == 0).all()) == frozen


@by_side
@by_dtype
@by_layout
def test_nothing_masked_is_the_plain_layer(layout, dtype, side):
    plan = random_plan(7, random_tables(8, (1.0,)), layout, 10, 13)
    data = inputs(side, 10, 13, dtype)
    for ours, theirs in zip(
        forward_backward(op(side, plan, "runs"), *data), forward_backward(plain(side), *data), strict=True
    ):
        assert_same_bits(ours, theirs)


@by_backend
@by_side
def test_a_layer_without_groups_ignores_the_tables(side, backend):
    plan = random_plan(7, random_tables(8, (0.0,)), "sorted", 10, 13)
    data = inputs(side, 10, 13, torch.float32)
    ungrouped = op(side, plan, backend, bounds=(0, BOUNDS[-1]))
    for ours, theirs in zip(forward_backward(ungrouped, *data), forward_backward(plain(side), *data), strict=True):
        assert_same_bits(ours, theirs)


@by_backend
@by_dtype
@by_side
@by_layout
def test_non_interference(layout, side, dtype, backend):
    """What a token may not update keeps every bit whatever the token holds, in x and in the gradient that arrives."""
    tables = random_tables(9, BINARY)
    plan = random_plan(10, tables, layout, 10, 13)
    x, weight, bias = inputs(side, 10, 13, dtype)
    dy = random_like(torch.empty(10, 13, SIDES[side][3], dtype=dtype), 0)
    before = gradients(side, plan, backend, x, weight, bias, dy)
    for label in {run.label for run in plan.runs}:
        other = token_mask(plan, [label])[..., None]
        after = gradients(
            side, plan, backend, x.where(~other, 50 * x + 1), weight, bias, dy.where(~other, -30 * dy - 1)
        )
        for group, (start, end) in enumerate(pairwise(BOUNDS)):
            exempt = tables.contribution(SIDES[side][1], label, group) == 0
            for old, new in zip(before, after, strict=True):
                if side == "in" or old.dim() == 2:
                    assert torch.equal(old[start:end], new[start:end]) == exempt
        if side == "out":
            assert torch.equal(before[1], after[1]) == (tables.update_joint["attn_out_bias"][label] == 0)


def gradients(side, plan, backend, x, weight, bias, dy) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    return torch.autograd.grad(op(side, plan, backend)(x, weight, bias), (weight, bias), dy)


@by_side
def test_partial_sums_are_added_in_fp32(side):
    """256 and then six times 1: each added in bf16, the sum would stay 256."""
    lengths = [256, *[1] * 12]
    tables = random_tables(0, (1.0,))
    update = dict.fromkeys(tables.update, ((1.0,) * 3, (0.0,) * 3, (1.0,) * 3, (1.0,) * 3))
    tables = type(tables)(tables.labels, tables.groups, tables.active, tables.route, update, tables.update_joint)
    plan = MaskPlan(tables, merge_runs([i % 2 for i in range(13)], lengths), 1, sum(lengths))
    data = [torch.ones_like(x) for x in inputs(side, 1, sum(lengths), torch.bfloat16)]
    leaves = [x.requires_grad_() for x in data]
    out = op(side, plan, "runs")(*leaves)
    out.backward(torch.ones_like(out))
    assert bool((leaves[1].grad == 262).all())
    assert side == "out" or bool((leaves[2].grad == 262).all())


@by_side
def test_no_bias_frozen_input_and_strided_gradient(side):
    """What a caller may do: no bias, an input that needs no gradient, a gradient that is not contiguous."""
    plan = random_plan(11, random_tables(12), "ragged", 6, 5)
    x, weight, bias = inputs(side, 6, 5, torch.float32)
    dy = random_like(torch.empty(5, 6, SIDES[side][3]), 0).transpose(0, 1)
    _, _, dw, _ = forward_backward(op(side, plan, "runs"), x, weight, bias, seed=1)
    weight.requires_grad_()
    (same,) = torch.autograd.grad(op(side, plan, "runs")(x, weight), weight, random_like(x.new_empty(dy.shape), 1))
    assert_same_bits(same, dw)
    (strided,) = torch.autograd.grad(op(side, plan, "runs")(x, weight), weight, dy)
    (packed,) = torch.autograd.grad(op(side, plan, "runs")(x, weight), weight, dy.contiguous())
    torch.testing.assert_close(strided, packed)


@by_backend
@by_side
def test_gradcheck(side, backend):
    plan = random_plan(13, random_tables(14, (1.0,)), "ragged", 2, 3)
    data = [x.requires_grad_() for x in inputs(side, 2, 3)]
    torch.autograd.gradcheck(op(side, plan, backend), data)
