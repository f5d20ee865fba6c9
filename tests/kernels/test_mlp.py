"""The MLP's non-linearity: `active` in the forward pass, `route` in the backward pass."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from sgtm_kernels.dispatch import BACKENDS
from sgtm_kernels.mlp import gelu, linear_gelu, swiglu
from sgtm_kernels.plan import MaskPlan
from sgtm_kernels.testing import (
    BINARY,
    EXACT,
    FAST,
    FLOATS,
    LAYOUTS,
    assert_accurate,
    assert_same_bits,
    backends_and_dtypes,
    forward_backward,
    low_precision,
    random_like,
    random_plan,
    random_tables,
    token_mask,
)

BOUNDS = (0, 21, 24, 40)
NEURONS = BOUNDS[-1]
OPS = {"gelu": (gelu, NEURONS), "swiglu": (swiglu, 2 * NEURONS)}

by_name = pytest.mark.parametrize("name", OPS)
by_layout = pytest.mark.parametrize("layout", LAYOUTS)
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_exact = pytest.mark.parametrize("backend", EXACT)
by_backend_and_dtype = pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes())
by_fast_and_dtype = pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(FAST))


def op(name: str, plan, backend: str, bounds=BOUNDS):
    return lambda x: OPS[name][0](x, plan, bounds, backend)


def plain(name: str):
    """The unmasked op. The bits of torch's silu depend on the strides, so gates and ups are the same views."""
    if name == "gelu":
        return lambda x: F.gelu(x, approximate="tanh")

    def plain_swiglu(x):
        pieces = [x[..., 2 * start : 2 * end].chunk(2, -1) for start, end in pairwise(BOUNDS)]
        return torch.cat([F.silu(gate) * up for gate, up in pieces], dim=-1)

    return plain_swiglu


def unmasked(name: str, backend: str):
    """The op with nothing masked: torch's, except that kernels of ours have roundings of their own."""
    if backend != "triton":
        return plain(name)
    free = random_tables(7, (1.0,))
    return lambda x: op(name, MaskPlan.uniform(free, 0, *x.shape[:2]), backend)(x)


def data(name: str, batch: int, seq_len: int, dtype=torch.float64) -> torch.Tensor:
    return random_like(torch.empty(batch, seq_len, OPS[name][1], dtype=torch.bfloat16), 1).to(dtype)


def factors(plan, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`active` and `route` of every token and column, fp64 [B, S, columns]."""
    labels = torch.tensor([run.label for run in plan.label_runs for _ in range(run.start, run.end)])
    fold = columns // NEURONS
    groups = torch.tensor([g for g in range(3) for _ in range(fold * BOUNDS[g], fold * BOUNDS[g + 1])])
    tables = [torch.tensor(table, dtype=torch.float64) for table in (plan.tables.active, plan.tables.route)]
    active, route = (table[labels][:, groups].view(plan.batch, plan.seq_len, columns) for table in tables)
    return active, route


@by_exact
@by_name
@by_layout
def test_formula_in_fp64(layout, name, backend):
    plan = random_plan(1, random_tables(2), layout, 9, 7)
    x = data(name, 9, 7)
    out, dx = forward_backward(op(name, plan, backend), x)
    plain_out = plain(name)(x)
    active, _ = factors(plan, NEURONS)
    torch.testing.assert_close(out, active * plain_out, rtol=1e-12, atol=1e-12)
    _, plain_dx = forward_backward(plain(name), x)
    active, route = factors(plan, OPS[name][1])
    torch.testing.assert_close(dx, active * route * plain_dx, rtol=1e-12, atol=1e-12)


@by_fast_and_dtype
@by_name
@by_layout
@pytest.mark.parametrize(("batch", "seq_len"), [(1, 1), (9, 7), (10, 100)])
def test_as_accurate_as_torch(batch, seq_len, layout, name, backend, dtype):
    plan = random_plan(3, random_tables(4, FLOATS), layout, batch, seq_len)
    exact = forward_backward(op(name, plan, "reference"), data(name, batch, seq_len))
    theirs = forward_backward(op(name, plan, "reference"), data(name, batch, seq_len, dtype))
    ours = forward_backward(op(name, plan, backend), data(name, batch, seq_len, dtype))
    for what, *values in zip(("h", "dx"), ours, theirs, exact, strict=True):
        assert_accurate(*values, name=what)


@by_backend_and_dtype
@by_name
@by_layout
def test_binary_masks_are_exact(layout, name, dtype, backend):
    """Inactive: 0 out and back. Stopped: the plain value out, 0 back. Otherwise: the unmasked op, all bit for bit."""
    plan = random_plan(5, random_tables(6, BINARY), layout, 10, 13)
    out, dx = forward_backward(op(name, plan, backend), data(name, 10, 13, dtype))
    plain_out, plain_dx = forward_backward(unmasked(name, backend), data(name, 10, 13, dtype))
    active, _ = factors(plan, NEURONS)
    assert_same_bits(out, plain_out.where(active != 0, 0.0), "h")
    active, route = factors(plan, OPS[name][1])
    assert_same_bits(dx, plain_dx.where(active * route != 0, 0.0), "dx")


@by_exact
@by_name
@pytest.mark.parametrize("values", [(1.0,), (0.0,)])
def test_nothing_masked_and_no_groups_are_the_plain_op(values, name, backend):
    plan = random_plan(7, random_tables(8, values), "tokens", 10, 13)
    x = data(name, 10, 13, torch.float32)
    if values == (1.0,):
        pairs = [(op(name, plan, backend), plain(name))]
    else:
        whole = (lambda x: F.silu(x[..., :NEURONS]) * x[..., NEURONS:]) if name == "swiglu" else plain(name)
        pairs = [(op(name, plan, backend, bounds=(0, NEURONS)), whole)]
    for ours, theirs in pairs:
        for mine, wanted in zip(forward_backward(ours, x), forward_backward(theirs, x), strict=True):
            assert_same_bits(mine, wanted)


@by_backend
@by_name
@by_layout
def test_tokens_do_not_touch_one_another(layout, name, backend):
    plan = random_plan(9, random_tables(10), layout, 6, 5)
    x = data(name, 6, 5, low_precision(backend))
    before = forward_backward(op(name, plan, backend), x)
    for label in {run.label for run in plan.label_runs}:
        mine = token_mask(plan, [label])[..., None]
        after = forward_backward(op(name, plan, backend), x.where(mine, 7 - x))
        for old, new in zip(before, after, strict=True):
            assert_same_bits(new.where(mine, 0.0), old.where(mine, 0.0))


@by_backend
@by_name
@pytest.mark.parametrize("layout", ["sorted", "tokens"])
def test_strided_input_and_gradient(layout, name, backend):
    plan = random_plan(11, random_tables(12), layout, 6, 9)
    x = data(name, 9, 6, torch.float32).transpose(0, 1)
    dy = random_like(torch.empty(9, 6, NEURONS), 2).transpose(0, 1)
    results = []
    for x_, dy_ in [(x, dy), (x.contiguous(), dy.contiguous())]:
        leaf = x_.detach().requires_grad_()
        out = op(name, plan, backend)(leaf)
        results.append((out.detach(), *torch.autograd.grad(out, leaf, dy_)))
    for strided, packed in zip(*results, strict=True):
        torch.testing.assert_close(strided, packed, rtol=1e-6, atol=1e-6)


@by_exact
@by_name
@pytest.mark.parametrize("layout", ["ragged", "tokens"])
def test_gradcheck(layout, name, backend):
    """`active` is part of the function, so its gradient is the true derivative; route is 1 here."""
    tables = random_tables(14)
    ones = tuple((1.0,) * 3 for _ in tables.labels)
    tables = type(tables)(tables.labels, tables.groups, tables.active, ones, tables.update, tables.update_joint)
    plan = random_plan(13, tables, layout, 2, 5)
    torch.autograd.gradcheck(op(name, plan, backend), data(name, 2, 5).requires_grad_(), fast_mode=True)


WIDTH = 6


def whole(plan, backend: str, bounds=BOUNDS):
    return lambda x, w, b: linear_gelu(x, w, b, plan, bounds, backend)


def layer(batch: int, seq_len: int, dtype=torch.float64) -> list[torch.Tensor]:
    sizes = (batch, seq_len, WIDTH), (NEURONS, WIDTH), (NEURONS,)
    return [random_like(torch.empty(size, dtype=torch.bfloat16), i).to(dtype) for i, size in enumerate(sizes)]


def bias_rows(plan, updated: bool) -> torch.Tensor:
    """Rows of the bias that some token of the plan may update, or that none may."""
    live = [any(by_label[run.label] for run in plan.label_runs) for by_label in plan.contributions("mlp_in", 3)]
    return torch.tensor([live[g] == updated for g in range(3) for _ in range(*BOUNDS[g : g + 2])])


@by_fast_and_dtype
@by_layout
@pytest.mark.parametrize(("batch", "seq_len"), [(1, 1), (9, 7), (3, 100)])
def test_linear_gelu_as_accurate_as_torch(batch, seq_len, layout, backend, dtype):
    """The pair as one op, in particular the bias's gradient; 300 tokens are more than one partial sum."""
    plan = random_plan(3, random_tables(4, FLOATS), layout, batch, seq_len)
    exact = forward_backward(whole(plan, "reference"), *layer(batch, seq_len))
    theirs = forward_backward(whole(plan, "reference"), *layer(batch, seq_len, dtype))
    ours = forward_backward(whole(plan, backend), *layer(batch, seq_len, dtype))
    for what, *values in zip(("h", "dx", "dw", "db"), ours, theirs, exact, strict=True):
        assert_accurate(*values, name=what)
    assert torch.equal(ours[3][bias_rows(plan, updated=False)], torch.zeros_like(ours[3][bias_rows(plan, False)]))


@by_backend
@by_layout
def test_the_mask_of_the_bias_touches_nothing_else(layout, backend):
    tables = random_tables(18, BINARY)
    free = replace(tables, update=dict.fromkeys(tables.update, ((1.0,) * 3,) * 4))
    results = [
        forward_backward(whole(random_plan(17, t, layout, 10, 13), backend), *layer(10, 13, low_precision(backend)))
        for t in (tables, free)
    ]
    for mine, wanted in zip(*(result[:2] for result in results), strict=True):
        assert_same_bits(mine, wanted)
    assert not torch.equal(results[0][3], results[1][3])


@by_backend
@by_layout
def test_the_bias_learns_from_its_own_tokens(layout, backend):
    plan = random_plan(19, random_tables(20, BINARY), layout, 10, 13)
    x, *parameters = layer(10, 13, low_precision(backend))
    before = forward_backward(whole(plan, backend), x, *parameters)[3]
    contributions = plan.contributions("mlp_in", 3)
    for label in plan.present:
        other = (3 - x).where(token_mask(plan, [label])[..., None], x)
        after = forward_backward(whole(plan, backend), other, *parameters)[3]
        for by_label, (start, end) in zip(contributions, pairwise(BOUNDS), strict=True):
            assert by_label[label] != 0 or torch.equal(after[start:end], before[start:end])


@by_backend
def test_linear_gelu_of_a_layer_without_groups_is_not_masked(backend):
    plans = [random_plan(15, random_tables(16, (value,)), "ragged", 3, 7) for value in (1.0, 0.0)]
    results = [forward_backward(whole(plan, backend, (0, NEURONS)), *layer(3, 7, torch.float32)) for plan in plans]
    for mine, wanted in zip(*results, strict=True):
        assert_same_bits(mine, wanted)
        assert mine.abs().sum() > 0


@by_backend
def test_linear_gelu_with_a_strided_bias(backend):
    plan, (x, weight, bias) = random_plan(21, random_tables(22), "tokens", 3, 30), layer(3, 30, torch.float32)
    results = []
    for b in (bias, torch.stack((-bias, bias), -1)[:, 1]):
        leaves = [t.detach().requires_grad_() for t in (x, weight, b)]
        out = whole(plan, backend)(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, random_like(out, 0))))
    for mine, wanted in zip(*results, strict=True):
        assert_same_bits(mine, wanted)


@by_name
def test_a_layer_without_groups_is_not_masked_by_the_kernel(name):
    free, masked = (random_plan(15, random_tables(16, (value,)), "ragged", 3, 7) for value in (1.0, 0.0))
    x = data(name, 3, 7, torch.float32)
    results = [forward_backward(op(name, plan, "triton", (0, NEURONS)), x) for plan in (free, masked)]
    for mine, wanted in zip(*results, strict=True):
        assert_same_bits(mine, wanted)
        assert mine.abs().sum() > 0
