"""Masked linear layers: dW and db by label and group, everything else the plain layer's."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from linear_layers import BOUNDS, FAST, KERNELS, SIDES, by_kernel, by_side, gradients, inputs, op, use_algorithm

from sgtm_kernels.linear import kernel, linear_in, scaling
from sgtm_kernels.plan import MaskPlan, merge_label_runs
from sgtm_kernels.testing import (
    BINARY,
    EXACT,
    FLOATS,
    LAYOUTS,
    assert_accurate,
    assert_same_bits,
    forward_backward,
    low_precision,
    random_like,
    random_plan,
    random_tables,
    token_mask,
)
from sgtm_kernels.triton_common import tiles

by_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def chosen_algorithm(request, monkeypatch):
    use_algorithm(request, monkeypatch)


def low(backend: str) -> torch.dtype:
    return low_precision("triton" if backend in KERNELS else backend)


def dtypes_of(*backends: str) -> list[tuple[str, torch.dtype]]:
    return [(backend, dtype) for backend in backends for dtype in (torch.float32, low(backend))]


by_exact = pytest.mark.parametrize("backend", EXACT)
by_backend = pytest.mark.parametrize("backend", ("reference", *FAST))


def cases(*backends: str) -> list[tuple[str, str, torch.dtype]]:
    """The algorithms of `triton` differ only where labels change from token to token."""
    return [
        (layout, backend, dtype)
        for layout in LAYOUTS
        for backend, dtype in dtypes_of(*backends)
        if layout == "tokens" or backend not in KERNELS[1:]
    ]


by_case = pytest.mark.parametrize(("layout", "backend", "dtype"), cases("reference", *FAST))
by_fast_case = pytest.mark.parametrize(("layout", "backend", "dtype"), cases(*FAST))


def plain(side: str):
    return F.linear if side == "in" else lambda x, weight, bias=None: F.linear(x, weight.t(), bias)


@by_exact
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


@by_fast_case
@by_side
@pytest.mark.parametrize(("batch", "seq_len"), [(1, 1), (9, 7), (10, 100)])
def test_as_accurate_as_torch(batch, seq_len, layout, side, backend, dtype):
    plan = random_plan(3, random_tables(4, FLOATS), layout, batch, seq_len)
    exact = forward_backward(op(side, plan, "reference"), *inputs(side, batch, seq_len))
    theirs = forward_backward(op(side, plan, "reference"), *inputs(side, batch, seq_len, dtype))
    ours = forward_backward(op(side, plan, backend), *inputs(side, batch, seq_len, dtype))
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


@by_case
@by_side
def test_masked_rows_are_zero_and_dx_is_the_plain_one(layout, side, dtype, backend):
    tables = random_tables(5, BINARY)
    plan = random_plan(6, tables, layout, 10, 13)
    data = inputs(side, 10, 13, dtype)
    out, dx, dw, _ = forward_backward(op(side, plan, backend), *data)
    plain_out, plain_dx, *_ = forward_backward(plain(side), *data)
    assert_same_bits(out, plain_out, "y")
    assert_same_bits(dx, plain_dx, "dx")
    present = {run.label for run in plan.label_runs}
    for group, (start, end) in enumerate(pairwise(BOUNDS)):
        frozen = all(tables.contribution(SIDES[side][1], label, group) == 0 for label in present)
        assert bool((dw[start:end] == 0).all()) == frozen


@by_fast_case
@by_side
def test_nothing_masked_is_the_plain_layer(layout, backend, dtype, side):
    plan = random_plan(7, random_tables(8, (1.0,)), layout, 10, 13)
    data = inputs(side, 10, 13, dtype)
    for ours, theirs in zip(
        forward_backward(op(side, plan, backend), *data), forward_backward(plain(side), *data), strict=True
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


@by_case
@by_side
def test_non_interference(layout, side, dtype, backend):
    """What a token may not update keeps every bit whatever the token holds, in x and in the gradient that arrives."""
    tables = random_tables(9, BINARY)
    plan = random_plan(10, tables, layout, 10, 13)
    x, weight, bias = inputs(side, 10, 13, dtype)
    dy = random_like(torch.empty(10, 13, SIDES[side][3], dtype=dtype), 0)
    before = gradients(side, plan, backend, x, weight, bias, dy)
    for label in {run.label for run in plan.label_runs}:
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


@by_side
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("ones", [6, 12])  # as few slices and as more than MAX_SLICES
def test_partial_sums_are_added_in_fp32(ones, side, backend):
    """A power of 2 and then a few times 1: each added in half precision, the sum would stay that power."""
    dtype = low(backend)
    power = round(2 / torch.finfo(dtype).eps)
    lengths = [power, *[1] * 2 * ones]
    tables = random_tables(0, (1.0,))
    update = dict.fromkeys(tables.update, ((1.0,) * 3, (0.0,) * 3, (1.0,) * 3, (1.0,) * 3))
    tables = type(tables)(tables.labels, tables.groups, tables.active, tables.route, update, tables.update_joint)
    plan = MaskPlan(tables, merge_label_runs([i % 2 for i in range(len(lengths))], lengths), 1, sum(lengths))
    data = [torch.ones_like(x) for x in inputs(side, 1, sum(lengths), dtype)]
    leaves = [x.requires_grad_() for x in data]
    out = op(side, plan, backend)(*leaves)
    out.backward(torch.ones_like(out))
    assert bool((leaves[1].grad == power + ones).all())
    assert side == "out" or bool((leaves[2].grad == power + ones).all())


@by_side
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("layout", ["ragged", "tokens"])
def test_no_bias_frozen_input_and_strided_gradient(layout, side, backend):
    """What a caller may do: no bias, an input that needs no gradient, a gradient or an input that is not contiguous."""
    plan = random_plan(11, random_tables(12), layout, 6, 9)
    x, weight, bias = inputs(side, 6, 9, torch.float32)
    dy = random_like(torch.empty(9, 6, SIDES[side][3]), 0).transpose(0, 1)
    _, _, dw, db = forward_backward(op(side, plan, backend), x, weight, bias, seed=1)
    weight.requires_grad_()
    same_dy = random_like(x.new_empty(dy.shape), 1)
    (same,) = torch.autograd.grad(op(side, plan, backend)(x, weight), weight, same_dy)
    assert_same_bits(same, dw)
    bias.requires_grad_()
    (same,) = torch.autograd.grad(op(side, plan, backend)(x, weight.detach(), bias), bias, same_dy)
    torch.testing.assert_close(same, db)
    (packed,) = torch.autograd.grad(op(side, plan, backend)(x, weight), weight, dy.contiguous())
    strided_x = x.transpose(0, 1).contiguous().transpose(0, 1)
    for x_, dy_ in ((x, dy), (strided_x, dy.contiguous())):
        (strided,) = torch.autograd.grad(op(side, plan, backend)(x_, weight), weight, dy_)
        torch.testing.assert_close(strided, packed)


@by_exact
@by_side
def test_gradcheck(side, backend):
    plan = random_plan(13, random_tables(14, (1.0,)), "ragged", 2, 3)
    data = [x.requires_grad_() for x in inputs(side, 2, 3)]
    torch.autograd.gradcheck(op(side, plan, backend), data)


# More rows, columns and tokens than a tile of any kernel has, and never a multiple of it. The first row ranges are too
# ragged for tensor descriptors.
TILED = [(BINARY, torch.float16, 264, (0, 70, 81, 210)), (FLOATS, torch.float32, 144, (0, 72, 80, 208))]


@by_kernel
@by_side
@pytest.mark.parametrize(("values", "dtype", "columns", "bounds"), TILED)
def test_several_tiles(values, dtype, columns, bounds, side, backend):
    tokens = 150
    plan = random_plan(15, random_tables(16, values), "tokens", 1, tokens)
    widths = (columns, bounds[-1]) if side == "in" else (bounds[-1], columns)
    shapes = [(1, tokens, widths[0]), (bounds[-1], columns), (widths[1],)]
    data = [random_like(torch.empty(shape, dtype=torch.float16), i) / 4 for i, shape in enumerate(shapes)]
    results = [
        forward_backward(op(side, plan, name, bounds), *(x.to(kind) for x in data))
        for name, kind in ((backend, dtype), ("reference", dtype), ("reference", torch.float64))
    ]
    for name, *values in zip(("y", "dx", "dw", "db"), *results, strict=True):
        assert_accurate(*values, name=name)


def test_layers_that_share_a_plan_share_no_rectangles():
    """Bounds and projection decide what is masked, and a plan keeps the tables of every layer."""
    shared, weight_gradients = random_plan(25, random_tables(26), "tokens", 4, 25), []
    x, weight, _ = inputs("in", 4, 25, torch.float32)
    for projection, bounds in (("mlp_in", BOUNDS), ("attn_in", BOUNDS), ("mlp_in", (0, 8, 30, 48)), ("mlp_in", BOUNDS)):
        fresh = random_plan(25, random_tables(26), "tokens", 4, 25)
        mine, wanted = (
            forward_backward(lambda x, w: linear_in(x, w, None, plan, projection, bounds, "triton"), x, weight)[2]  # noqa: B023
            for plan in (shared, fresh)
        )
        assert_same_bits(mine, wanted)
        weight_gradients.append(mine)
    assert not any(torch.equal(one, other) for one, other in pairwise(weight_gradients))


def test_a_bias_of_more_partial_sums_than_a_tile_has():
    tokens = 2 * scaling.TILE.heuristic("fp32").strip * tiles.PARTIALS + 9
    plan = random_plan(23, random_tables(24), "tokens", 1, tokens)
    by_group = ((1.0, 0.0, 0.5, -1.0), (0.0, 2.0, 1.0, 1.0))
    x = random_like(torch.empty(tokens, 5), 0)
    total = scaling.masked_sum(x, plan.factors(by_group, x.device), (0, 2, 5))
    first, second = (plan.token_weights(by_label, x.double()) for by_label in by_group)
    wanted = torch.cat([first @ x[:, :2].double(), second @ x[:, 2:].double()])
    torch.testing.assert_close(total, wanted.float(), rtol=1e-5, atol=1e-4)


def test_an_unknown_algorithm_is_an_error(monkeypatch):
    monkeypatch.setenv("SGTM_LINEAR", "rectangle")
    with pytest.raises(ValueError, match="SGTM_LINEAR is 'rectangle'; it takes masked or rectangles"):
        kernel.dw_algorithm(torch.zeros(2, 4), ())
