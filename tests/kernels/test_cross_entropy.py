"""LM head and cross-entropy: loss and dX plain, the head's gradient by label, loss sums by label.

Chunks are made small, so that runs begin and end inside them.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sgtm_kernels.cross_entropy import linear_cross_entropy
from sgtm_kernels.cross_entropy import pytorch as cross_entropy_pytorch
from sgtm_kernels.dispatch import BACKENDS, pick
from sgtm_kernels.plan import MaskPlan, merge_label_runs
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
    poisoned_memory,
    random_like,
    random_plan,
    random_tables,
    token_mask,
)

VOCAB, WIDTH, SCALE = 19, 12, 0.37

by_layout = pytest.mark.parametrize("layout", LAYOUTS)
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_exact = pytest.mark.parametrize("backend", EXACT)
by_fast = pytest.mark.parametrize("backend", FAST)
by_backend_and_dtype = pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes())
by_fast_and_dtype = pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(FAST))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Of 24 tokens in fp32; the kernel takes 19 logits in two blocks."""
    for backend in FAST:
        monkeypatch.setattr(pick("cross_entropy", backend), "CHUNK_BYTES", 24 * VOCAB * 4)
    monkeypatch.setattr(cross_entropy_pytorch, "ROWS", 5)
    monkeypatch.setattr(pick("cross_entropy", "triton"), "BLOCK", 16)


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


@by_exact
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


@by_fast_and_dtype
@by_layout
@pytest.mark.parametrize(("batch", "seq_len"), [(1, 1), (9, 7), (10, 25)])
def test_as_accurate_as_torch(batch, seq_len, layout, backend, dtype):
    plan = random_plan(3, random_tables(4), layout, batch, seq_len)
    t = targets(batch, seq_len)
    exact, theirs, ours = (
        forward_backward(op(plan, backend, t), *inputs(batch, seq_len, d))
        for backend, d in (("reference", torch.float64), ("reference", dtype), (backend, dtype))
    )
    assert ours[0].dtype == torch.float32
    for name, *values in zip(("loss", "dx", "dw", "db"), ours, theirs, exact, strict=True):
        assert_accurate(*values, name=name)


@by_backend_and_dtype
@by_layout
def test_loss_and_dx_do_not_know_of_masks(layout, dtype, backend):
    t, data = targets(9, 5), inputs(9, 5, dtype)
    masked = random_plan(5, random_tables(6, (0.0,)), layout, 9, 5)
    free = random_plan(5, random_tables(6, (1.0,)), layout, 9, 5)
    loss, dx, *learned = forward_backward(op(masked, backend, t), *data)
    free_loss, free_dx, *_ = forward_backward(op(free, backend, t), *data)
    assert_same_bits(loss, free_loss, "loss")
    assert_same_bits(dx, free_dx, "dx")
    assert all(bool((d == 0).all()) for d in learned)


@by_backend_and_dtype
@by_layout
def test_non_interference(layout, dtype, backend):
    plan = random_plan(9, random_tables(10, BINARY), layout, 9, 5)
    x, weight, bias = (d.requires_grad_() for d in inputs(9, 5, dtype))

    def learned(x, t):
        loss, sums = linear_cross_entropy(x, weight, bias, t, plan, SCALE, backend)
        return torch.autograd.grad(loss, (weight, bias)), sums

    t, other_t = targets(9, 5), targets(9, 5, seed=8)
    before, sums = learned(x, t)
    for label in {run.label for run in plan.label_runs}:
        mine = token_mask(plan, [label])
        after, new_sums = learned(x.detach().where(~mine[..., None], 1 - 3 * x), t.where(~mine, other_t))
        for kind, old, new in zip(("head", "head_bias"), before, after, strict=True):
            assert torch.equal(old, new) == (plan.tables.update_joint[kind][label] == 0)
        assert [i for i in range(4) if new_sums[i] != sums[i]] == [label]


@by_fast
def test_partial_sums_are_added_in_fp32(monkeypatch, backend):
    """Every token predicts 0 for a target of 1: in dW 256 (2048 in fp16) and then six times 1, which half precision
    would not add."""
    monkeypatch.setattr(pick("cross_entropy", backend), "CHUNK_BYTES", 2**20)
    dtype = low_precision(backend)
    first = 1 if dtype is torch.bfloat16 else 8
    lengths, tables = [256, *[1] * 12], random_tables(0, (1.0,))
    joint = dict.fromkeys(tables.update_joint, (1.0, 0.0, 1.0, 1.0))
    tables = type(tables)(tables.labels, tables.groups, tables.active, tables.route, tables.update, joint)
    plan = MaskPlan(tables, merge_label_runs([i % 2 for i in range(13)], lengths), 1, sum(lengths))
    x, weight = torch.ones(1, plan.tokens, WIDTH).to(dtype), torch.zeros(VOCAB, WIDTH).to(dtype).requires_grad_()
    x[:, :256] = first
    bias = torch.eye(VOCAB)[0].mul(200).to(dtype).requires_grad_()
    t = torch.ones(1, plan.tokens, dtype=torch.long)
    loss, _ = linear_cross_entropy(x, weight, bias, t, plan, 1.0, backend)
    loss.backward()
    assert bias.grad.tolist() == [262.0, -262.0, *[0.0] * (VOCAB - 2)]
    assert weight.grad[:, 0].tolist() == [256.0 * first + 6, -256.0 * first - 6, *[0.0] * (VOCAB - 2)]


@by_backend
def test_nothing_to_predict(backend):
    plan = random_plan(11, random_tables(12), "sorted", 5, 4)
    loss, *gradients = forward_backward(op(plan, backend, torch.full((5, 4), -100)), *inputs(5, 4, torch.float32))
    assert loss == 0 and all(bool((d == 0).all()) for d in gradients)


@by_fast
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_asked_for(needed, backend):
    """Each gradient alone is the one computed with all others."""
    plan, t, data = random_plan(13, random_tables(14), "ragged", 6, 9), targets(6, 9), inputs(6, 9, torch.float32)
    together = [d.clone().requires_grad_() for d in data]
    every = torch.autograd.grad(op(plan, backend, t)(*together), together)
    alone = [d.clone().requires_grad_(need) for d, need in zip(data, needed, strict=True)]
    (one,) = torch.autograd.grad(op(plan, backend, t)(*alone), [d for d in alone if d.requires_grad])
    assert_same_bits(one, every[needed.index(True)])


@by_fast
def test_evaluation_computes_no_gradient(monkeypatch, backend):
    plan, t = random_plan(13, random_tables(14), "sorted", 6, 9), targets(6, 9)
    data = [d.requires_grad_() for d in inputs(6, 9, torch.float32)]
    flags = []
    module = pick("cross_entropy", backend)
    original = module._softmax_gradient_
    monkeypatch.setattr(module, "_softmax_gradient_", lambda *args: flags.append(args[2]) or original(*args))
    with torch.no_grad():
        loss = op(plan, backend, t)(*data)
    assert set(flags) == {False}
    assert_same_bits(loss, op(plan, backend, t)(*data).detach())


@by_exact
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
def test_losses_of_half_precision_logits_are_in_fp32(backend):
    plan = random_plan(20, random_tables(21), "uniform", 2, 9)
    data, t = exact_logits(low_precision(backend), 1 / 8, 0), targets(2, 9)
    loss = op(plan, backend, t)(*data)
    torch.testing.assert_close(loss.double(), plain(t)(*(x.double() for x in data)), rtol=1e-6, atol=0)


def exact_logits(dtype: torch.dtype, step: float, offset: float) -> list[torch.Tensor]:
    """x, weight, bias whose logits are `offset + step * index`, without rounding."""
    x, weight, bias = (torch.zeros_like(leaf) for leaf in inputs(2, 9, dtype))
    x[..., 0] = 1
    weight[:, 0] = torch.arange(VOCAB) * step
    return [x, weight, bias + offset]


class Waits(TorchDispatchMode):
    """Counts what a GPU would be waited for: a value read by Python, or a shape that depends on values."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "index.Tensor", "unique", "equal")

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(f"aten.{name}" in str(func) for name in self.NAMES):
            self.ops.append(str(func))
        return func(*args, **kwargs or {})


@by_layout
def test_the_kernel_waits_for_nothing(layout):
    plan, t = random_plan(15, random_tables(16, (1.0,)), layout, 4, 9), targets(4, 9)
    data = [d.requires_grad_() for d in inputs(4, 9, torch.float32)]
    with Waits() as waits:
        loss, _ = linear_cross_entropy(*data, t, plan, SCALE, "triton")
        loss.backward()
    assert not waits.ops and data[1].grad.abs().sum() > 0
    with Waits() as waits:
        bool((t == -100).any())
        t[t == -100]
    assert len(waits.ops) == 2, "the counter counts"


@by_fast
def test_chunks_that_may_not_update_the_head_skip_its_matmul(monkeypatch, backend):
    """Sixteen sequences of 6 tokens in four chunks; only the fifth and sixth, in the second chunk, update the head."""
    added = []
    original = cross_entropy_pytorch._Sum.add
    monkeypatch.setattr(
        cross_entropy_pytorch._Sum, "add", lambda self, *args: added.append(args[0].shape) or original(self, *args)
    )
    tables = random_tables(0, (1.0,))
    joint = tables.update_joint | {"head": (0.0, 1.0, 1.0, 1.0)}
    tables = type(tables)(tables.labels, tables.groups, tables.active, tables.route, tables.update, joint)
    plan = MaskPlan(tables, merge_label_runs([int(i in (4, 5)) for i in range(16)], [6] * 16), 16, 6)
    forward_backward(op(plan, backend, targets(16, 6)), *inputs(16, 6, torch.float32)[:2])
    assert added == [(VOCAB, WIDTH)]


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("vocab", [1, 7, 1000, 50257])
def test_the_kernel_on_rows_of_any_length(monkeypatch, vocab, gradient):
    """Against fp64, with the blocks it really has. Ignored targets: exactly 0, whatever lies in their row."""
    monkeypatch.undo()
    kernel, n = pick("cross_entropy", "triton"), 6
    rows = random_like(torch.empty(n, vocab), 1) * 5
    rows[2] += 1000  # the exponentials would overflow without the maximum
    t = torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(2))
    t[3] = -100
    z = rows.clone().requires_grad_()
    expected = F.cross_entropy(z.double(), t, reduction="none")
    (slope,) = torch.autograd.grad(expected.sum(), z)
    with poisoned_memory():
        room = torch.empty(n, vocab + 5)  # padding that must not count
        room[:, :vocab] = rows
        room[3, :vocab] = 3e38
        losses = kernel._softmax_gradient_(room[:, :vocab], t, gradient)
    assert losses[3] == 0
    assert bool((room[:, vocab:] == 0).all() if gradient else room[:, vocab:].isnan().all())
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=1e-5)
    if gradient:
        assert bool((room[3, :vocab] == 0).all())
        torch.testing.assert_close(room[:, :vocab].double(), slope.double(), rtol=1e-5, atol=1e-7)
    else:
        assert_same_bits(room[4, :vocab], rows[4])


@by_backend
def test_strided_targets(backend):
    plan, t = random_plan(22, random_tables(23), "ragged", 6, 9), targets(6, 9)
    strided = torch.stack((t.flip(1), t), -1)[..., 1]
    assert not strided.is_contiguous()
    data = inputs(6, 9, torch.float32)
    for mine, wanted in zip(*(forward_backward(op(plan, backend, each), *data) for each in (strided, t)), strict=True):
        assert_same_bits(mine, wanted)


@pytest.mark.parametrize("wrong", [-1, VOCAB, 2**40])
def test_a_target_that_does_not_exist_makes_the_loss_nan(wrong):
    """And is not looked up: torch on a GPU would stop the process."""
    t = targets(2, 3)
    t[1, 1] = wrong
    plan = random_plan(17, random_tables(18), "uniform", 2, 3)
    assert op(plan, "triton", t)(*inputs(2, 3, torch.float32)).isnan()


@pytest.mark.parametrize("vocab", [19, 50257, 50304])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_logits_begin_at_multiples_of_128_bytes(dtype, vocab):
    kernel = pick("cross_entropy", "triton")
    x, weight = torch.ones(3, 2, dtype=dtype), torch.ones(vocab, 2, dtype=dtype)
    logits = kernel._logits(x, weight, None)
    assert logits.shape == (3, vocab) and bool((logits == 2).all())
    assert logits.stride(0) * logits.element_size() % 128 == 0 and logits.stride(0) - vocab < 128
