"""Masked table lookup: only tokens that may update the table are scattered into its gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sgtm_kernels.dispatch import BACKENDS
from sgtm_kernels.embedding import embedding
from sgtm_kernels.testing import (
    BINARY,
    EXACT,
    FAST,
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

VOCAB, WIDTH = 17, 8

by_layout = pytest.mark.parametrize("layout", LAYOUTS)
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_exact = pytest.mark.parametrize("backend", EXACT)
by_fast = pytest.mark.parametrize("backend", FAST)
by_backend_and_dtype = pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes())
by_fast_and_dtype = pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(FAST))


def ids(batch: int, seq_len: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB - 1, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def table(dtype=torch.float64) -> torch.Tensor:
    return random_like(torch.empty(VOCAB, WIDTH, dtype=torch.bfloat16), 2).to(dtype)


def op(plan, backend: str, kind: str = "embedding"):
    return lambda i, weight: embedding(i, weight, plan, kind, backend)


def plain(i, weight):
    return F.embedding(i, weight)


@by_exact
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


@by_fast_and_dtype
@by_layout
@pytest.mark.parametrize(("batch", "seq_len"), [(1, 1), (9, 7), (10, 100)])
def test_as_accurate_as_torch(batch, seq_len, layout, backend, dtype):
    plan = random_plan(3, random_tables(4), layout, batch, seq_len)
    i = ids(batch, seq_len)
    exact, theirs, ours = (
        forward_backward(op(plan, b), i, table(d))
        for b, d in (("reference", torch.float64), ("reference", dtype), (backend, dtype))
    )
    assert_same_bits(ours[0], theirs[0], "y")
    assert_accurate(ours[2], theirs[2], exact[2], "dw")


@by_fast
@pytest.mark.parametrize("layout", ["sorted", "tokens"])
def test_a_frequent_token_is_summed_in_fp32(layout, backend):
    """4096 times 1.0 in half precision: added one by one, the sum stops at 256 (bf16) or 2048 (fp16)."""
    plan = random_plan(5, random_tables(6, (1.0,)), layout, 8, 512)
    weight = torch.zeros(VOCAB, WIDTH, dtype=low_precision(backend), requires_grad=True)
    out = op(plan, backend)(torch.full((8, 512), 3), weight)
    out.backward(torch.ones_like(out))
    assert weight.grad[3].tolist() == [4096.0] * WIDTH


@by_fast
def test_a_long_sum_is_rounded_once(backend):
    """Gradients that cancel, some tokens later: partial sums in half precision would leave their roundings behind."""
    plan = random_plan(5, random_tables(6, (1.0,)), "uniform", 1, 512)
    weight = torch.zeros(VOCAB, WIDTH, dtype=low_precision(backend), requires_grad=True)
    half = random_like(torch.empty(256, WIDTH, dtype=weight.dtype), 1)
    out = op(plan, backend)(torch.full((1, 512), 3), weight)
    out.backward(torch.cat([half, -half.roll(7, 0)])[None])
    assert weight.grad.abs().max() < 1e-4


@by_layout
def test_nothing_masked_is_the_plain_lookup(layout):
    plan = random_plan(7, random_tables(8, (1.0,)), layout, 10, 13)
    ours, theirs = (forward_backward(f, ids(10, 13), table(torch.float32)) for f in (op(plan, "torch"), plain))
    assert_same_bits(ours[0], theirs[0], "y")
    assert_same_bits(ours[2], theirs[2], "dw")


@by_backend
@by_layout
def test_all_masked_is_zero(layout, backend):
    plan = random_plan(7, random_tables(8, (0.0,)), layout, 10, 13)
    _, _, dw = forward_backward(op(plan, backend), ids(10, 13), table(low_precision(backend)))
    assert_same_bits(dw, torch.zeros_like(dw))


@by_backend_and_dtype
@by_layout
def test_non_interference(layout, dtype, backend):
    plan = random_plan(9, random_tables(10, BINARY), layout, 10, 13)
    i, weight = ids(10, 13), table(dtype).requires_grad_()
    dy = random_like(torch.empty(10, 13, WIDTH, dtype=dtype), 0)
    (before,) = torch.autograd.grad(op(plan, backend)(i, weight), weight, dy)
    for label in {run.label for run in plan.label_runs}:
        mine = token_mask(plan, [label])
        other_ids, other_dy = i.where(~mine, ids(10, 13, seed=5)), dy.where(~mine[..., None], 1 - 9 * dy)
        (after,) = torch.autograd.grad(op(plan, backend)(other_ids, weight), weight, other_dy)
        assert torch.equal(before, after) == (plan.tables.update_joint["embedding"][label] == 0)


@by_exact
def test_gradcheck(backend):
    plan = random_plan(13, random_tables(14, (1.0,)), "ragged", 2, 5)
    torch.autograd.gradcheck(lambda w: op(plan, backend)(ids(2, 5), w), [table().requires_grad_()], fast_mode=True)


def skewed(tokens: int, seed: int) -> torch.Tensor:
    """Ids of which a few make up most of the tokens, as words do; the last of the table never occurs."""
    uniform = torch.rand(tokens, generator=torch.Generator().manual_seed(seed))
    return (uniform.pow(3) * (VOCAB - 1)).long()


@by_layout
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64, 500])
@pytest.mark.parametrize("many", ["skewed", "same", "positions"])
def test_kernel_over_segments(many, tokens, layout):
    """Ids within one segment of sorted tokens, over the border of two, and over many, at every rest of the last one."""
    plan = random_plan(15, random_tables(16), layout, 1, tokens)
    i = {"skewed": skewed(tokens, 1), "same": torch.full((tokens,), 7), "positions": torch.arange(tokens) % 11}[many]
    results = [
        forward_backward(op(plan, backend), i.view(1, -1), table(dtype))[2]
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64))
    ]
    assert_accurate(*results, "dw")


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 63), (70, 200), (5, 1100)])
def test_kernel_at_any_size_of_table(rows, width):
    """More rows than a tile, more columns than one of either kernel, or fewer."""
    plan = random_plan(17, random_tables(18), "ragged", 2, 90)
    i = (skewed(180, 2) % rows).view(2, 90)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        weight = random_like(torch.empty(rows, width, dtype=torch.bfloat16), 3).to(dtype)
        results.append(forward_backward(op(plan, backend), i, weight)[2])
    assert_accurate(*results, "dw")


def test_masked_ids_do_not_move_the_segments_of_the_kernel():
    """Where ids are summed over several segments, the ids of masked tokens must not shift the borders."""
    plan = random_plan(19, random_tables(21, BINARY), "tokens", 4, 100)
    update = plan.tables.update_joint["embedding"]
    mine = token_mask(plan, [label for label, value in enumerate(update) if value == 0])
    assert mine.any() and not mine.all()
    i, weight = skewed(400, 3).view(4, 100), table(torch.float32).requires_grad_()
    dy = random_like(torch.empty(4, 100, WIDTH), 0)
    results = []
    for other in (i, torch.zeros_like(i), torch.full_like(i, VOCAB - 1)):
        out = op(plan, "triton")(i.where(~mine, other), weight)
        poisoned = dy.where(~mine[..., None], float("nan")) if other is not i else dy
        results.append(torch.autograd.grad(out, weight, poisoned)[0])
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_the_kernel_sorts_stably(monkeypatch):
    """The tokens of an id are added in their order: the bits are the same in every run, on every device."""
    sorts, plain = [], torch.sort
    monkeypatch.setattr(torch, "sort", lambda *args, **kwargs: sorts.append(kwargs) or plain(*args, **kwargs))
    plan = random_plan(21, random_tables(22), "tokens", 4, 9)
    weight = table(torch.float32).requires_grad_()
    op(plan, "triton")(ids(4, 9), weight).sum().backward()
    assert [kwargs.get("stable") for kwargs in sorts] == [True]


def test_kernel_under_checkpointing_and_with_strides():
    plan = random_plan(21, random_tables(22), "ragged", 6, 9)
    i, dy, results = ids(6, 9), random_like(torch.empty(6, 9, WIDTH), 1), []
    turned = i.t().contiguous().t(), dy.transpose(0, 1).contiguous().transpose(0, 1)
    for i_, dy_, again in [(i, dy, False), (i, dy, True), (*turned, False)]:
        weight = table(torch.float32).requires_grad_()
        function = op(plan, "triton")
        out = checkpoint(function, i_, weight, use_reentrant=False) if again else function(i_, weight)
        results.append(torch.autograd.grad(out, weight, dy_)[0])
    for other in results[1:]:
        assert_same_bits(other, results[0])
