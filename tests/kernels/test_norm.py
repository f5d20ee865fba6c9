"""LayerNorm and RMSNorm: weight and bias learn by label, the output and dX are the plain norm's.

Faults tried, each seen to fail: the tokens of another kind; the bias or the weight gradient unmasked; dX from a
masked gradient; the normalised input without its mean; eps left out; the weight missing in RMSNorm's dX; the mean
over tokens instead of columns.
"""

import pytest
import torch
import torch.nn.functional as F

from sgtm_kernels.dispatch import BACKENDS
from sgtm_kernels.norm import layer_norm, rms_norm
from sgtm_kernels.testing import (
    BINARY,
    LAYOUTS,
    assert_accurate,
    assert_same_bits,
    forward_backward,
    random_like,
    random_plan,
    random_tables,
    token_mask,
)

WIDTH, EPS = 40, 1e-3

by_norm = pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
by_layout = pytest.mark.parametrize("layout", LAYOUTS)
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def op(norm: str, plan, backend: str, kind: str | None = "norm"):
    if norm == "rms_norm":
        return lambda x, weight: rms_norm(x, weight, EPS, plan, kind, backend)
    return lambda x, weight, bias: layer_norm(x, weight, bias, EPS, plan, kind, backend)


def plain(norm: str):
    if norm == "rms_norm":
        return lambda x, weight: F.rms_norm(x, (WIDTH,), weight, EPS)
    return lambda x, weight, bias: F.layer_norm(x, (WIDTH,), weight, bias, EPS)


def inputs(norm: str, batch: int, seq_len: int, dtype=torch.float64) -> list[torch.Tensor]:
    shapes = [(batch, seq_len, WIDTH), (WIDTH,), (WIDTH,)][: 2 if norm == "rms_norm" else 3]
    data = [random_like(torch.empty(shape, dtype=torch.bfloat16), i).to(dtype) for i, shape in enumerate(shapes)]
    return [data[0] * 3 + 2, *data[1:]]


@by_backend
@by_norm
@by_layout
@pytest.mark.parametrize("kind", ["norm", "final_norm", None])
def test_formula_in_fp64(kind, layout, norm, backend):
    """Gradients are the sum over labels of torch's own from that label's tokens, times the table's entry."""
    plan = random_plan(1, random_tables(2), layout, 9, 7)
    data = inputs(norm, 9, 7)
    out, dx, *learned = forward_backward(op(norm, plan, backend, kind), *data)
    plain_out, plain_dx, *_ = forward_backward(plain(norm), *data)
    want = [torch.zeros_like(d) for d in learned]
    for label in range(len(plan.tables.labels)):
        factor = 1.0 if kind is None else plan.tables.update_joint[kind][label]
        leaves = [d.clone().requires_grad_() for d in data[1:]]
        dy = random_like(out, 0) * token_mask(plan, [label])[..., None]
        for total, d in zip(want, torch.autograd.grad(plain(norm)(data[0], *leaves), leaves, dy), strict=True):
            total += factor * d
    for ours, theirs in zip([out, dx, *learned], [plain_out, plain_dx, *want], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@by_dtype
@by_norm
@by_layout
@pytest.mark.parametrize(("batch", "seq_len"), [(1, 1), (9, 7), (10, 100)])
def test_runs_are_as_accurate_as_torch(batch, seq_len, layout, norm, dtype):
    plan = random_plan(3, random_tables(4), layout, batch, seq_len)
    exact = forward_backward(op(norm, plan, "reference"), *inputs(norm, batch, seq_len))
    theirs = forward_backward(op(norm, plan, "reference"), *inputs(norm, batch, seq_len, dtype))
    ours = forward_backward(op(norm, plan, "runs"), *inputs(norm, batch, seq_len, dtype))
    if layout == "tokens" and dtype == torch.float32:
        theirs[2:] = by_matmul(norm, plan, inputs(norm, batch, seq_len, dtype)[0], random_like(theirs[0], 0))
    for name, *values in zip(("y", "dx", "dw", "db"), ours, theirs, exact, strict=False):
        assert_accurate(*values, name=name)


def by_matmul(norm: str, plan, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """dw and db as torch's matmul gives them: over many runs the op is one too, five times as fast as a sum."""
    weights = plan.token_weights(plan.tables.update_joint["norm"], x)
    normalized = F.layer_norm(x, (WIDTH,), eps=EPS) if norm == "layer_norm" else F.rms_norm(x, (WIDTH,), eps=EPS)
    return [weights @ (normalized * dy).flatten(0, 1), weights @ dy.flatten(0, 1)]


@by_backend
@by_dtype
@by_norm
@by_layout
def test_dx_does_not_know_of_masks(layout, norm, dtype, backend):
    data = inputs(norm, 10, 13, dtype)
    masked = random_plan(5, random_tables(6, (0.0,)), layout, 10, 13)
    free = random_plan(5, random_tables(6, (1.0,)), layout, 10, 13)
    out, dx, *learned = forward_backward(op(norm, masked, backend), *data)
    free_out, free_dx, *_ = forward_backward(op(norm, free, backend), *data)
    assert_same_bits(out, free_out, "y")
    assert_same_bits(dx, free_dx, "dx")
    assert all(bool((d == 0).all()) for d in learned)


@by_dtype
@by_layout
def test_nothing_masked_is_torchs_layer_norm(layout, dtype):
    plan = random_plan(7, random_tables(8, (1.0,)), layout, 10, 13)
    data = inputs("layer_norm", 10, 13, dtype)
    ours, theirs = (forward_backward(f, *data) for f in (op("layer_norm", plan, "runs"), plain("layer_norm")))
    for mine, wanted in zip(ours, theirs, strict=True):
        assert_same_bits(mine, wanted)


@by_backend
@by_norm
def test_no_kind_ignores_the_tables(norm, backend):
    plans = [random_plan(7, random_tables(8, (value,)), "tokens", 10, 13) for value in (0.0, 1.0)]
    data = inputs(norm, 10, 13, torch.bfloat16)
    results = [forward_backward(op(norm, plan, backend, None), *data) for plan in plans]
    for mine, wanted in zip(*results, strict=True):
        assert_same_bits(mine, wanted)


@by_backend
@by_dtype
@by_norm
@by_layout
def test_non_interference(layout, norm, dtype, backend):
    plan = random_plan(9, random_tables(10, BINARY), layout, 10, 13)
    x, *learned = (d.requires_grad_() for d in inputs(norm, 10, 13, dtype))
    dy = random_like(x, 0)
    before = torch.autograd.grad(op(norm, plan, backend)(x, *learned), learned, dy)
    for label in {run.label for run in plan.runs}:
        other = token_mask(plan, [label])[..., None]
        new_x, new_dy = x.detach().where(~other, 50 * x + 1), dy.where(~other, -30 * dy - 1)
        after = torch.autograd.grad(op(norm, plan, backend)(new_x, *learned), learned, new_dy)
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old, new) == (plan.tables.update_joint["norm"][label] == 0)


@by_backend
@by_norm
def test_gradcheck(norm, backend):
    plan = random_plan(13, random_tables(14, (1.0,)), "ragged", 2, 3)
    torch.autograd.gradcheck(op(norm, plan, backend), [x.requires_grad_() for x in inputs(norm, 2, 3)], fast_mode=True)
