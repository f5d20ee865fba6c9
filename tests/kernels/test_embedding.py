"""Masked table lookup: only tokens that may update the table are scattered into its gradient.

Faults tried, each seen to fail: a slice dropped; a weight ignored; the ids of one slice with the gradients of
another; no slice at all left unhandled; all tokens scattered; the table of `position`; accumulation in bf16.
"""

import pytest
import torch
import torch.nn.functional as F

from sgtm_kernels.dispatch import BACKENDS
from sgtm_kernels.embedding import embedding
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

VOCAB, WIDTH = 17, 8

by_layout = pytest.mark.parametrize("layout", LAYOUTS)
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def ids(batch: int, seq_len: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB - 1, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def table(dtype=torch.float64) -> torch.Tensor:
    return random_like(torch.empty(VOCAB, WIDTH, dtype=torch.bfloat16), 2).to(dtype)


def op(plan, backend: str, kind: str = "embedding"):
    return lambda i, weight: embedding(i, weight, plan, kind, backend)


def plain(i, weight):
    return F.embedding(i, weight)


@by_backend
@by_layout
@pytest.mark.parametrize("kind", ["embedding", "position"])
def test_formula_in_fp64(kind, layout, backend):
    plan = random_plan(1, random_tables(2), layout, 9, 7)
    i, weight = ids(9, 7), table()
    out, _, dw = forward_backward(op(plan, backend, kind), i, weight)
    assert_same_bits(out, weight[i])
    want, dy = torch.zeros_like(weight), random_like(out, 0)
    for label in range(len(plan.tables.labels)):
        mine = token_mask(plan, [label])
        want.index_add_(0, i[mine], dy[mine], alpha=plan.tables.update_joint[kind][label])
    torch.testing.assert_close(dw, want, rtol=1e-12, atol=1e-12)


@by_dtype
@by_layout
@pytest.mark.parametrize(("batch", "seq_len"), [(1, 1), (9, 7), (10, 100)])
def test_runs_are_as_accurate_as_torch(batch, seq_len, layout, dtype):
    plan = random_plan(3, random_tables(4), layout, batch, seq_len)
    i = ids(batch, seq_len)
    exact, theirs, ours = (
        forward_backward(op(plan, backend), i, table(d))
        for backend, d in (("reference", torch.float64), ("reference", dtype), ("runs", dtype))
    )
    assert_same_bits(ours[0], theirs[0], "y")
    assert_accurate(ours[2], theirs[2], exact[2], "dw")


@pytest.mark.parametrize("layout", ["sorted", "tokens"])
def test_a_frequent_token_is_summed_in_fp32(layout):
    """1024 times 1.0 in bf16: added one by one in bf16, the sum stops at 256."""
    plan = random_plan(5, random_tables(6, (1.0,)), layout, 8, 128)
    weight = torch.zeros(VOCAB, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    out = op(plan, "runs")(torch.full((8, 128), 3), weight)
    out.backward(torch.ones_like(out))
    assert weight.grad[3].tolist() == [1024.0] * WIDTH


@by_layout
def test_nothing_masked_is_the_plain_lookup(layout):
    plan = random_plan(7, random_tables(8, (1.0,)), layout, 10, 13)
    ours, theirs = (forward_backward(f, ids(10, 13), table(torch.float32)) for f in (op(plan, "runs"), plain))
    assert_same_bits(ours[0], theirs[0], "y")
    assert_same_bits(ours[2], theirs[2], "dw")


@by_backend
@by_layout
def test_all_masked_is_zero(layout, backend):
    plan = random_plan(7, random_tables(8, (0.0,)), layout, 10, 13)
    _, _, dw = forward_backward(op(plan, backend), ids(10, 13), table(torch.bfloat16))
    assert_same_bits(dw, torch.zeros_like(dw))


@by_backend
@by_dtype
@by_layout
def test_non_interference(layout, dtype, backend):
    plan = random_plan(9, random_tables(10, BINARY), layout, 10, 13)
    i, weight = ids(10, 13), table(dtype).requires_grad_()
    dy = random_like(torch.empty(10, 13, WIDTH, dtype=dtype), 0)
    (before,) = torch.autograd.grad(op(plan, backend)(i, weight), weight, dy)
    for label in {run.label for run in plan.runs}:
        mine = token_mask(plan, [label])
        other_ids, other_dy = i.where(~mine, ids(10, 13, seed=5)), dy.where(~mine[..., None], 1 - 9 * dy)
        (after,) = torch.autograd.grad(op(plan, backend)(other_ids, weight), weight, other_dy)
        assert torch.equal(before, after) == (plan.tables.update_joint["embedding"][label] == 0)


@by_backend
def test_gradcheck(backend):
    plan = random_plan(13, random_tables(14, (1.0,)), "ragged", 2, 5)
    torch.autograd.gradcheck(lambda w: op(plan, backend)(ids(2, 5), w), [table().requires_grad_()], fast_mode=True)
