"""LayerNorm and RMSNorm: weight and bias learn by label, the output and dX are the plain norm's."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sgtm_kernels.dispatch import BACKENDS, pick
from sgtm_kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
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

WIDTH, EPS = 40, 1e-3
kernel = pick("norm", "triton")

by_norm = pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
by_layout = pytest.mark.parametrize("layout", LAYOUTS)
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_exact = pytest.mark.parametrize("backend", EXACT)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
by_backend_and_dtype = pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes())
by_fast_and_dtype = pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(FAST))


def op(norm: str, plan, backend: str, kind: str | None = "norm"):
    if norm == "rms_norm":
        return lambda x, weight: rms_norm(x, weight, EPS, plan, kind, backend)
    return lambda x, weight, bias: layer_norm(x, weight, bias, EPS, plan, kind, backend)


def plain(norm: str):
    if norm == "rms_norm":
        return lambda x, weight: F.rms_norm(x, (WIDTH,), weight, EPS)
    return lambda x, weight, bias: F.layer_norm(x, (WIDTH,), weight, bias, EPS)


def inputs(norm: str, batch: int, seq_len: int, dtype=torch.float64, width: int = WIDTH) -> list[torch.Tensor]:
    shapes = [(batch, seq_len, width), (width,), (width,)][: 2 if norm == "rms_norm" else 3]
    data = [random_like(torch.empty(shape, dtype=torch.bfloat16), i).to(dtype) for i, shape in enumerate(shapes)]
    return [data[0] * 3 + 2, *data[1:]]


@by_exact
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


@by_fast_and_dtype
@by_norm
@by_layout
@pytest.mark.parametrize(("batch", "seq_len"), [(1, 1), (9, 7), (10, 100)])
def test_as_accurate_as_torch(batch, seq_len, layout, norm, backend, dtype):
    plan = random_plan(3, random_tables(4), layout, batch, seq_len)
    exact = forward_backward(op(norm, plan, "reference"), *inputs(norm, batch, seq_len))
    theirs = forward_backward(op(norm, plan, "reference"), *inputs(norm, batch, seq_len, dtype))
    ours = forward_backward(op(norm, plan, backend), *inputs(norm, batch, seq_len, dtype))
    if (backend, layout, dtype) == ("torch", "tokens", torch.float32):
        theirs[2:] = by_matmul(norm, plan, inputs(norm, batch, seq_len, dtype)[0], random_like(theirs[0], 0))
    for name, *values in zip(("y", "dx", "dw", "db"), ours, theirs, exact, strict=False):
        assert_accurate(*values, name=name)


def by_matmul(norm: str, plan, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """dw and db as torch's matmul gives them: over many runs the op is one too, five times as fast as a sum."""
    weights = plan.token_weights(plan.tables.update_joint["norm"], x)
    normalized = F.layer_norm(x, (WIDTH,), eps=EPS) if norm == "layer_norm" else F.rms_norm(x, (WIDTH,), eps=EPS)
    return [weights @ (normalized * dy).flatten(0, 1), weights @ dy.flatten(0, 1)]


@by_backend_and_dtype
@by_norm
@by_layout
def test_dx_does_not_know_of_masks(layout, norm, dtype, backend):
    """Whether some tokens are masked, or all, from which weight and bias then learn exactly nothing."""
    data = inputs(norm, 10, 13, dtype)
    free = random_plan(5, random_tables(6, (1.0,)), layout, 10, 13)
    free_out, free_dx, *_ = forward_backward(op(norm, free, backend), *data)
    for values in (FLOATS, (0.0,)):
        masked = random_plan(5, random_tables(6, values), layout, 10, 13)
        out, dx, *learned = forward_backward(op(norm, masked, backend), *data)
        assert_same_bits(out, free_out, "y")
        assert_same_bits(dx, free_dx, "dx")
    assert all(bool((d == 0).all()) for d in learned)


@by_dtype
@by_layout
def test_nothing_masked_is_torchs_layer_norm(layout, dtype):
    plan = random_plan(7, random_tables(8, (1.0,)), layout, 10, 13)
    data = inputs("layer_norm", 10, 13, dtype)
    ours, theirs = (forward_backward(f, *data) for f in (op("layer_norm", plan, "torch"), plain("layer_norm")))
    for mine, wanted in zip(ours, theirs, strict=True):
        assert_same_bits(mine, wanted)


@by_backend
@by_norm
def test_no_kind_ignores_the_tables(norm, backend):
    plans = [random_plan(7, random_tables(8, (value,)), "tokens", 10, 13) for value in (0.0, 1.0)]
    data = inputs(norm, 10, 13, low_precision(backend))
    results = [forward_backward(op(norm, plan, backend, None), *data) for plan in plans]
    for mine, wanted in zip(*results, strict=True):
        assert_same_bits(mine, wanted)


@by_backend_and_dtype
@by_norm
@by_layout
def test_non_interference(layout, norm, dtype, backend):
    plan = random_plan(9, random_tables(22, BINARY), layout, 10, 13)
    assert set(plan.tables.update_joint["norm"]) == {0.0, 1.0}
    x, *learned = (d.requires_grad_() for d in inputs(norm, 10, 13, dtype))
    dy = random_like(x, 0)
    before = torch.autograd.grad(op(norm, plan, backend)(x, *learned), learned, dy)
    for label in {run.label for run in plan.runs}:
        other = token_mask(plan, [label])[..., None]
        new_x, new_dy = x.detach().where(~other, 50 * x + 1), dy.where(~other, -30 * dy - 1)
        after = torch.autograd.grad(op(norm, plan, backend)(new_x, *learned), learned, new_dy)
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old, new) == (plan.tables.update_joint["norm"][label] == 0)


@by_exact
@by_norm
def test_gradcheck(norm, backend):
    plan = random_plan(13, random_tables(14, (1.0,)), "ragged", 2, 3)
    torch.autograd.gradcheck(op(norm, plan, backend), [x.requires_grad_() for x in inputs(norm, 2, 3)], fast_mode=True)


def assert_kernel_is_accurate(norm: str, plan: MaskPlan, width: int) -> None:
    """In fp32: the error is within the budget of torch's own."""
    results = [
        forward_backward(op(norm, plan, backend), *inputs(norm, plan.batch, plan.seq_len, dtype, width))
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64))
    ]
    for name, *values in zip(("y", "dx", "dw", "db"), *results, strict=False):
        assert_accurate(*values, name=name)


@by_norm
@pytest.mark.parametrize("width", [1, 63, 128, 1000, 2500])
def test_kernel_at_any_width(width, norm):
    """From many tokens in a tile to one; widths that fill a tile and that do not."""
    plan = random_plan(15, random_tables(16), "ragged", 3, 37)
    assert_kernel_is_accurate(norm, plan, width)


@by_norm
@pytest.mark.parametrize(("strips", "width"), [(1, 40), (3, 40), (3, 300), (512, 300)])
def test_kernel_in_strips(strips, width, norm, monkeypatch):
    """One strip; strips of several tiles, the last one ragged; more strips than the second pass adds at once."""
    monkeypatch.setattr(kernel, "STRIPS", strips)
    plan = random_plan(17, random_tables(18), "tokens", 7, 41)
    assert_kernel_is_accurate(norm, plan, width)


@by_norm
@by_layout
def test_kernel_without_masks_is_the_kernel_with_factors_of_one(layout, norm, monkeypatch):
    """The sums of a plan that masks nothing, of no kind, and of factors that are read and happen to be 1."""
    data = inputs(norm, 10, 13, torch.float32)
    free = random_plan(19, random_tables(20, (1.0,)), layout, 10, 13)
    results = [forward_backward(op(norm, free, "triton", kind), *data) for kind in ("norm", None)]
    monkeypatch.setattr(MaskPlan, "plain", lambda plan, tokens: False)
    results.append(forward_backward(op(norm, free, "triton"), *data))
    for other in results[1:]:
        for mine, wanted in zip(other, results[0], strict=True):
            assert_same_bits(mine, wanted)


@by_norm
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_not_even_nan_passes_the_kernels_mask(poison, norm):
    plan = random_plan(21, random_tables(22, BINARY), "tokens", 10, 13)
    x, *learned = (d.requires_grad_() for d in inputs(norm, 10, 13, torch.float32))
    before = torch.autograd.grad(op(norm, plan, "triton")(x, *learned), learned, random_like(x, 0))
    masked = token_mask(plan, [i for i, update in enumerate(plan.tables.update_joint["norm"]) if update == 0])
    assert masked.any() and not masked.all()
    new_x, dy = (t.detach().where(~masked[..., None], poison) for t in (x, random_like(x, 0)))
    after = torch.autograd.grad(op(norm, plan, "triton")(new_x, *learned), learned, dy)
    for old, new in zip(before, after, strict=True):
        assert_same_bits(new, old)


@by_norm
def test_kernel_under_checkpointing_and_with_strides(norm):
    plan = random_plan(23, random_tables(24), "ragged", 6, 9)
    x, *learned = inputs(norm, 6, 9, torch.float32)
    dy = random_like(x, 1)
    results = []
    apart = [torch.stack((-t, t), -1)[..., 1] for t in learned]
    turned = [_strided(t) for t in (x, dy)]
    for x_, dy_, learned_, again in [
        (x, dy, learned, False), (x, dy, learned, True), (*turned, learned, False), (x, dy, apart, False)
    ]:  # fmt: skip
        leaves = [t.detach().requires_grad_() for t in (x_, *learned_)]
        function = op(norm, plan, "triton")
        out = checkpoint(function, *leaves, use_reentrant=False) if again else function(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, dy_)))
    for other in results[1:]:
        for mine, wanted in zip(other, results[0], strict=True):
            assert_same_bits(mine, wanted)


def _strided(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def added(norm: str, plan, backend: str):
    """Both results of the norm with a residual, side by side, so that gradients arrive at both."""

    def function(x, residual, *learned):
        function = add_rms_norm if norm == "rms_norm" else add_layer_norm
        return torch.stack(function(x, residual, *learned, EPS, plan, "norm", backend))

    return function


def added_inputs(norm: str, batch: int, seq_len: int, dtype, width: int = WIDTH) -> list[torch.Tensor]:
    x, *learned = inputs(norm, batch, seq_len, dtype, width)
    return [x, random_like(x.to(torch.bfloat16), 7).to(dtype), *learned]


@by_backend_and_dtype
@by_norm
@by_layout
def test_a_residual_is_the_sum_and_its_norm(layout, norm, dtype, backend):
    """Sum and norm are bit for bit those of the two ops apart; gradients as accurate as theirs."""
    plan = random_plan(25, random_tables(26), layout, 9, 7)
    x, residual, *learned = data = added_inputs(norm, 9, 7, dtype)
    results = [
        forward_backward(added(norm, plan, name), *added_inputs(norm, 9, 7, of))
        for name, of in ((backend, dtype), ("reference", dtype), ("reference", torch.float64))
    ]
    assert_same_bits(results[0][0][0], x + residual, "sum")
    assert_same_bits(results[0][0][1], op(norm, plan, backend)(x + residual, *learned), "norm")
    for name, *values in zip(("both", "dx", "dresidual", "dw", "db"), *results, strict=False):
        assert_accurate(*values, name=name)
    free = forward_backward(added(norm, random_plan(25, random_tables(26, (1.0,)), layout, 9, 7), backend), *data)
    for mine, wanted in zip(results[0][:3], free[:3], strict=True):
        assert_same_bits(mine, wanted)


@by_norm
@pytest.mark.parametrize("width", [63, 1000, 2500])
def test_kernel_with_a_residual_at_any_width(width, norm):
    plan = random_plan(27, random_tables(28), "ragged", 3, 37)
    results = [
        forward_backward(added(norm, plan, backend), *added_inputs(norm, 3, 37, dtype, width))
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64))
    ]
    for name, *values in zip(("both", "dx", "dresidual", "dw", "db"), *results, strict=False):
        assert_accurate(*values, name=name)


@by_backend
@by_norm
@pytest.mark.parametrize("unused", [0, 1])
def test_an_unused_result_of_a_norm_with_a_residual(unused, norm, backend):
    """Sum or norm: the gradient is that of the other one alone."""
    plan = random_plan(29, random_tables(30), "ragged", 4, 9)
    x, residual, *learned = (d.requires_grad_() for d in added_inputs(norm, 4, 9, torch.float32))
    results = added(norm, plan, backend)(x, residual, *learned).unbind()
    dy = random_like(x, 3)
    gradients = torch.autograd.grad(results[1 - unused], (x, residual), dy)
    alone = x + residual if unused else op(norm, plan, backend)(x + residual, *learned)
    for mine, wanted in zip(gradients, torch.autograd.grad(alone, (x, residual), dy), strict=True):
        assert_same_bits(mine, wanted)


def test_a_residual_must_be_like_x():
    plan = MaskPlan.uniform(random_tables(0), 0, 2, 3)
    x, weight = inputs("rms_norm", 2, 3)
    for residual in (x.float(), x[:1]):
        with pytest.raises(ValueError, match="residual"):
            add_rms_norm(x, residual, weight, EPS, plan, "norm")
