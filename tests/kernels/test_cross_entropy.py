"""LM head and cross-entropy: loss and dX plain, the head's gradient by label, loss sums by label.

Chunks are made small, so that runs begin and end inside them.

Faults tried, each seen to fail: a chunk skipped; a slice cut short in its chunk; the bias under the head's table;
ignored targets counted in the loss, or in the gradient; `scale` or the incoming gradient forgotten; a slice's weight
ignored; partial sums added in bf16; dX without the tokens that may not update the head; sums scaled, or under the
next label; gradients computed under `no_grad`; the maximum of the logits subtracted too late.
"""

import pytest
import torch
import torch.nn.functional as F

from sgtm_kernels.cross_entropy import linear_cross_entropy
from sgtm_kernels.cross_entropy import runs as cross_entropy_runs
from sgtm_kernels.dispatch import BACKENDS
from sgtm_kernels.plan import MaskPlan, merge_runs
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

VOCAB, WIDTH, SCALE = 19, 12, 0.37

by_layout = pytest.mark.parametrize("layout", LAYOUTS)
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy_runs, "CHUNK_BYTES", 24 * VOCAB * 4)
    monkeypatch.setattr(cross_entropy_runs, "ROWS", 5)


def targets(batch: int, seq_len: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(VOCAB, (batch, seq_len), generator=generator)
    return drawn.masked_fill(torch.rand(batch, seq_len, generator=generator) < 0.2, -100)


def inputs(batch: int, seq_len: int, dtype=torch.float64) -> list[torch.Tensor]:
    """x, weight, bias"""
    shapes = [(batch, seq_len, WIDTH), (VOCAB, WIDTH), (VOCAB,)]
    return [random_like(torch.empty(shape, dtype=torch.bfloat16), i).to(dtype) for i, shape in enumerate(shapes)]


def op(plan, backend: str, t: torch.Tensor):
    return lambda x, weight, bias=None: linear_cross_entropy(x, weight, bias, t, plan, SCALE, backend)[0]


def plain(t: torch.Tensor):
    def loss(x, weight, bias=None):
        logits = F.linear(x, weight, bias).flatten(0, 1)
        return SCALE * F.cross_entropy(logits, t.flatten(), reduction="sum")

    return loss


@by_backend
@by_layout
@pytest.mark.parametrize("with_bias", [True, False])
def test_formula_in_fp64(with_bias, layout, backend):
    plan = random_plan(1, random_tables(2), layout, 9, 7)
    data, t = inputs(9, 7)[: 2 + with_bias], targets(9, 7)
    loss, dx, *learned = forward_backward(op(plan, backend, t), *data)
    sums = linear_cross_entropy(*inputs(9, 7)[: 2 + with_bias], *[None] * (not with_bias), t, plan, SCALE, backend)[1]
    dloss = random_like(loss, 0)  # what forward_backward sends back
    plain_loss, plain_dx, *_ = forward_backward(plain(t), *data)
    want, want_sums = [torch.zeros_like(d) for d in learned], torch.zeros_like(sums)
    for label in range(len(plan.tables.labels)):
        leaves = [d.clone().requires_grad_() for d in data]
        pure = plain(t.masked_fill(~token_mask(plan, [label]), -100))(*leaves)
        want_sums[label] = pure.detach() / SCALE
        for kind, total, d in zip(("head", "head_bias"), want, torch.autograd.grad(pure, leaves)[1:], strict=False):
            total += plan.tables.update_joint[kind][label] * dloss * d
    assert not sums.requires_grad
    for ours, theirs in zip([loss, dx, sums, *learned], [plain_loss, plain_dx, want_sums, *want], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@by_dtype
@by_layout
@pytest.mark.parametrize(("batch", "seq_len"), [(1, 1), (9, 7), (10, 100)])
def test_runs_are_as_accurate_as_torch(batch, seq_len, layout, dtype):
    plan = random_plan(3, random_tables(4), layout, batch, seq_len)
    t = targets(batch, seq_len)
    exact, theirs, ours = (
        forward_backward(op(plan, backend, t), *inputs(batch, seq_len, d))
        for backend, d in (("reference", torch.float64), ("reference", dtype), ("runs", dtype))
    )
    assert ours[0].dtype == torch.float32
    for name, *values in zip(("loss", "dx", "dw", "db"), ours, theirs, exact, strict=True):
        assert_accurate(*values, name=name)


@by_backend
@by_dtype
@by_layout
def test_loss_and_dx_do_not_know_of_masks(layout, dtype, backend):
    t, data = targets(10, 13), inputs(10, 13, dtype)
    masked = random_plan(5, random_tables(6, (0.0,)), layout, 10, 13)
    free = random_plan(5, random_tables(6, (1.0,)), layout, 10, 13)
    loss, dx, *learned = forward_backward(op(masked, backend, t), *data)
    free_loss, free_dx, *_ = forward_backward(op(free, backend, t), *data)
    assert_same_bits(loss, free_loss, "loss")
    assert_same_bits(dx, free_dx, "dx")
    assert all(bool((d == 0).all()) for d in learned)


@by_backend
@by_dtype
@by_layout
def test_non_interference(layout, dtype, backend):
    plan = random_plan(9, random_tables(10, BINARY), layout, 10, 13)
    t, (x, weight, bias) = targets(10, 13), (d.requires_grad_() for d in inputs(10, 13, dtype))
    before = torch.autograd.grad(op(plan, backend, t)(x, weight, bias), (weight, bias))
    sums = linear_cross_entropy(x, weight, bias, t, plan, SCALE, backend)[1]
    for label in {run.label for run in plan.runs}:
        mine = token_mask(plan, [label])
        new_x, new_t = x.detach().where(~mine[..., None], 1 - 3 * x), t.where(~mine, targets(10, 13, seed=8))
        after = torch.autograd.grad(op(plan, backend, new_t)(new_x, weight, bias), (weight, bias))
        for kind, old, new in zip(("head", "head_bias"), before, after, strict=True):
            assert torch.equal(old, new) == (plan.tables.update_joint[kind][label] == 0)
        new_sums = linear_cross_entropy(new_x, weight, bias, new_t, plan, SCALE, backend)[1]
        assert [i for i in range(4) if new_sums[i] != sums[i]] == [label]


def test_partial_sums_are_added_in_fp32(monkeypatch):
    """Every token predicts 0 for a target of 1: gradients of 256 and then six times 1, which bf16 would not add."""
    monkeypatch.setattr(cross_entropy_runs, "CHUNK_BYTES", 2**20)
    lengths, tables = [256, *[1] * 12], random_tables(0, (1.0,))
    joint = dict.fromkeys(tables.update_joint, (1.0, 0.0, 1.0, 1.0))
    tables = type(tables)(tables.labels, tables.groups, tables.active, tables.route, tables.update, joint)
    plan = MaskPlan(tables, merge_runs([i % 2 for i in range(13)], lengths), 1, sum(lengths))
    x, weight = torch.ones(1, plan.tokens, WIDTH).bfloat16(), torch.zeros(VOCAB, WIDTH).bfloat16().requires_grad_()
    bias = torch.eye(VOCAB)[0].mul(200).bfloat16().requires_grad_()
    t = torch.ones(1, plan.tokens, dtype=torch.long)
    loss, _ = linear_cross_entropy(x, weight, bias, t, plan, 1.0, "runs")
    loss.backward()
    assert bias.grad.tolist() == [262.0, -262.0, *[0.0] * (VOCAB - 2)]
    assert weight.grad[:, 0].tolist() == bias.grad.tolist()


@by_backend
def test_nothing_to_predict(backend):
    plan = random_plan(11, random_tables(12), "sorted", 5, 4)
    loss, *gradients = forward_backward(op(plan, backend, torch.full((5, 4), -100)), *inputs(5, 4, torch.float32))
    assert loss == 0 and all(bool((d == 0).all()) for d in gradients)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_asked_for(needed):
    """Each gradient alone is the one computed with all others."""
    plan, t, data = random_plan(13, random_tables(14), "ragged", 6, 9), targets(6, 9), inputs(6, 9, torch.float32)
    together = [d.clone().requires_grad_() for d in data]
    every = torch.autograd.grad(op(plan, "runs", t)(*together), together)
    alone = [d.clone().requires_grad_(need) for d, need in zip(data, needed, strict=True)]
    (one,) = torch.autograd.grad(op(plan, "runs", t)(*alone), [d for d in alone if d.requires_grad])
    assert_same_bits(one, every[needed.index(True)])


def test_evaluation_computes_no_gradient(monkeypatch):
    plan, t = random_plan(13, random_tables(14), "sorted", 6, 9), targets(6, 9)
    data = [d.requires_grad_() for d in inputs(6, 9, torch.float32)]
    asked = []
    original = cross_entropy_runs._softmax_gradient_
    monkeypatch.setattr(
        cross_entropy_runs, "_softmax_gradient_", lambda *args: asked.append(args[2]) or original(*args)
    )
    with torch.no_grad():
        loss = op(plan, "runs", t)(*data)
    assert set(asked) == {False}
    assert_same_bits(loss, op(plan, "runs", t)(*data).detach())


@by_backend
def test_gradcheck(backend):
    plan = random_plan(13, random_tables(14, (1.0,)), "ragged", 3, 11)
    torch.autograd.gradcheck(
        op(plan, backend, targets(3, 11)), [d.requires_grad_() for d in inputs(3, 11)], fast_mode=True
    )


@by_backend
@pytest.mark.parametrize(("step", "offset"), [(1 / 8, 4096), (16, 0)])
def test_logits_far_from_zero_cost_no_precision(step, offset, backend):
    """The loss is that of the differences between logits, however large they or their differences are."""
    plan = random_plan(20, random_tables(21), "uniform", 2, 9)
    x, weight, bias = exact_logits(torch.float32, step, offset)
    t = targets(2, 9)
    exact = forward_backward(plain(t), x.double(), weight.double(), bias.double())
    theirs = forward_backward(plain(t), x, weight, bias)
    ours = forward_backward(op(plan, backend, t), x, weight, bias)
    for name, *values in zip(("loss", "dx"), ours, theirs, exact, strict=False):
        assert_accurate(*values, name=name)


@by_backend
def test_losses_of_bf16_logits_are_in_fp32(backend):
    plan = random_plan(20, random_tables(21), "uniform", 2, 9)
    data, t = exact_logits(torch.bfloat16, 1 / 8, 0), targets(2, 9)
    loss = op(plan, backend, t)(*data)
    torch.testing.assert_close(loss.double(), plain(t)(*(x.double() for x in data)), rtol=1e-6, atol=0)


def exact_logits(dtype: torch.dtype, step: float, offset: float) -> list[torch.Tensor]:
    """x, weight, bias whose logits are `offset + step * index`, without rounding."""
    x, weight, bias = (torch.zeros_like(leaf) for leaf in inputs(2, 9, dtype))
    x[..., 0] = 1
    weight[:, 0] = torch.arange(VOCAB) * step
    return [x, weight, bias + offset]
