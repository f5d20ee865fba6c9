"""LayerNorm and RMSNorm in one Triton pass each way, the masked sums for weight and bias fused into the backward pass.

Backward reads x and dY once and writes dX for all tokens; a program walks a strip of tokens and keeps the sums of its
tokens, times their factors, in registers. A second, small kernel adds the strips' sums in order: no atomics. Where no
token is masked the kernel is compiled without factors, where all are it is compiled without sums. Multiplications and
additions are never contracted (`FUSION`), so that the bits of dX cannot depend on which of these it is.

A residual is added on the way (`add_layer_norm`, `add_rms_norm`): forward reads both terms and writes sum and norm,
backward adds the gradient that arrives at the sum to that of the norm. It saves a read of the sum forward, and backward
a read and a write of dX.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch.library import custom_op

from sgtm_kernels.autograd import captured, eager, existing, register
from sgtm_kernels.plan import MaskPlan, plan_of

TILE = 2048  # elements of a tile of tokens x columns; a wider row is a tile of its own
STRIPS = 512  # at most; more occupy more of the device and write more partial sums
SUM_STRIPS, SUM_COLUMNS = 32, 64  # of a tile of the second pass
FUSION = {"enable_fp_fusion": False}


def layer_norm(x, weight, bias, eps, plan: MaskPlan, kind):
    return _norm(x, weight, bias, plan, kind, eps)


def rms_norm(x, weight, eps, plan: MaskPlan, kind):
    return _norm(x, weight, None, plan, kind, eps)


def add_layer_norm(x, residual, weight, bias, eps, plan: MaskPlan, kind):
    return _add_norm(x, residual, weight, bias, plan, kind, eps)


def add_rms_norm(x, residual, weight, eps, plan: MaskPlan, kind):
    return _add_norm(x, residual, weight, None, plan, kind, eps)


def _norm(x, weight, bias, plan: MaskPlan, kind, eps):
    if captured():
        return norm(x, weight, bias, plan.handle, kind, eps)[0]
    return eager_norm(x, weight, bias, plan, kind, eps)


def _add_norm(x, residual, weight, bias, plan: MaskPlan, kind, eps):
    if captured():
        return add_norm(x, residual, weight, bias, plan.handle, kind, eps)[:2]
    return eager_add_norm(x, residual, weight, bias, plan, kind, eps)


@cache
def _shape(width: int) -> tuple[dict[str, int], int]:
    """Tile of a norm of this width, and its number of warps: 16 elements of the tile for each thread."""
    columns = triton.next_power_of_2(width)
    tokens = max(1, TILE // columns)
    return {"WIDTH": width, "BT": tokens, "BD": columns}, max(4, tokens * columns // 512)


def _forward(x, weight, bias, plan, kind, eps):
    """LayerNorm, or RMSNorm without a bias; and the mean (of LayerNorm) and the inverse deviation of each token."""
    return _normalized(x, None, weight, bias, eps)[1:]


def _add_forward(x, residual, weight, bias, plan, kind, eps):
    """The sum of x and residual, and what `_forward` returns for it."""
    return _normalized(x, residual, weight, bias, eps)


def _normalized(x, residual, weight, bias, eps):
    x, weight, centered, added = x.contiguous(), weight.contiguous(), bias is not None, residual is not None
    y, tokens = torch.empty_like(x), x.numel() // x.shape[-1]
    total = torch.empty_like(x) if added else None
    shape, warps = _shape(x.shape[-1])
    rstd = x.new_empty(tokens, dtype=torch.float32)
    mean = x.new_empty(tokens, dtype=torch.float32) if centered else None
    norm_forward[(-(-tokens // shape["BT"]),)](
        x, residual.contiguous() if added else x, weight, bias.contiguous() if centered else weight,
        total if added else y, y, mean if centered else rstd, rstd, tokens, eps, CENTERED=centered, ADDED=added,
        **shape, num_warps=warps, **FUSION,
    )  # fmt: skip
    return total, y, mean, rstd


def _backward(dy, x, weight, bias, mean, rstd, plan, kind, wanted):
    """dX, and where wanted those of weight and bias."""
    return _gradients(None, dy, x, weight, bias, mean, rstd, plan, kind, wanted[1] or wanted[2])


def _add_backward(dtotal, dy, total, weight, bias, mean, rstd, plan, kind, wanted):
    """The gradient of x, which is the residual's too, and where wanted those of weight and bias."""
    dx, *learned = _gradients(dtotal, dy, total, weight, bias, mean, rstd, plan, kind, wanted[2] or wanted[3])
    return dx, dx, *learned


def _gradients(dtotal, dy, x, weight, bias, mean, rstd, plan, kind, learns):
    """dX, and the gradients of weight and bias; None for these unless one of them `learns`."""
    x, dy, weight, centered = x.contiguous(), dy.contiguous(), weight.contiguous(), bias is not None
    summed = learns and (kind is None or bool(plan.joint(kind).slices))
    factors = plan.mask(kind, 1, x.device) if summed and kind is not None else None
    shape, warps = _shape(x.shape[-1])
    width, tokens = shape["WIDTH"], plan.tokens
    strip = -(-tokens // STRIPS)
    strip += -strip % shape["BT"]
    strips = -(-tokens // strip)
    sums = x.new_empty((1 + centered, strips, width) if summed else 1, dtype=torch.float32)
    dx, added = torch.empty_like(x), dtotal is not None
    norm_backward[(strips,)](
        x, dtotal.contiguous() if added else dy, dy, weight, mean if centered else rstd, rstd,
        rstd if factors is None else factors, dx, sums, tokens, strip, CENTERED=centered, ADDED=added, SUMMED=summed,
        MASKED=factors is not None, **shape, num_warps=warps, **FUSION,
    )  # fmt: skip
    if not learns:
        return dx, None, None
    new = torch.empty_like if summed else torch.zeros_like
    dw, db = new(weight), new(bias) if centered else None
    if summed:
        norm_sums[-(-width // SUM_COLUMNS), 1 + centered](
            sums, dw, db if centered else dw, strips, WIDTH=width, BS=SUM_STRIPS, BD=SUM_COLUMNS, **FUSION
        )
    return dx, dw, db


def _keep(inputs, outputs):
    x, weight, bias, plan, kind, _ = inputs
    return (x, weight, bias, *outputs[1:]), plan, (kind,)


def _add_keep(inputs, outputs):
    _, _, weight, bias, plan, kind, _ = inputs
    total, _, *statistics = outputs
    return (total, weight, bias, *statistics), plan, (kind,)


eager_norm = eager(_forward, _keep, _backward)
eager_add_norm = eager(_add_forward, _add_keep, _add_backward, (2, 2))


@custom_op(
    "sgtm::norm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor plan, str? kind, float eps) -> (Tensor, Tensor, Tensor)",
)
def norm(x, weight, bias, plan, kind, eps):
    y, mean, rstd = _forward(x, weight, bias, plan_of(plan), kind, eps)
    return y, rstd.new_empty(0) if mean is None else mean, rstd


@norm.register_fake
def _(x, weight, bias, plan, kind, eps):
    tokens = x.shape[:-1].numel()
    counts = (0 if bias is None else tokens), tokens
    return x.new_empty(x.shape), *(x.new_empty(n, dtype=torch.float32) for n in counts)


@custom_op(
    "sgtm::norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor mean, Tensor rstd, Tensor plan, str? kind, "
    "bool learns) -> (Tensor, Tensor, Tensor)",
)
def norm_gradients(dy, x, weight, bias, mean, rstd, plan, kind, learns):
    return existing(weight, *_backward(dy, x, weight, bias, mean, rstd, plan_of(plan), kind, (True, learns, learns)))


@norm_gradients.register_fake
def _(dy, x, weight, bias, mean, rstd, plan, kind, learns):
    width = x.shape[-1]
    db = weight.new_empty(0) if bias is None else bias.new_empty(width if learns else 0)
    return x.new_empty(x.shape), weight.new_empty(width if learns else 0), db


register(norm, _keep, lambda *inputs: norm_gradients(*inputs[:-1], inputs[-1][1] or inputs[-1][2]))


@custom_op(
    "sgtm::add_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor weight, Tensor? bias, Tensor plan, str? kind, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def add_norm(x, residual, weight, bias, plan, kind, eps):
    return existing(weight.new_empty(0, dtype=torch.float32), *_normalized(x, residual, weight, bias, eps))


@add_norm.register_fake
def _(x, residual, weight, bias, plan, kind, eps):
    tokens = x.shape[:-1].numel()
    counts = (0 if bias is None else tokens), tokens
    results = x.new_empty(x.shape), x.new_empty(x.shape)
    return *results, *(x.new_empty(n, dtype=torch.float32) for n in counts)


@custom_op(
    "sgtm::add_norm_backward",
    mutates_args=(),
    schema="(Tensor dtotal, Tensor dy, Tensor total, Tensor weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "Tensor plan, str? kind, bool learns) -> (Tensor, Tensor, Tensor)",
)
def add_norm_gradients(dtotal, dy, total, weight, bias, mean, rstd, plan, kind, learns):
    gradients = _gradients(dtotal, dy, total, weight, bias, mean, rstd, plan_of(plan), kind, learns)
    return existing(weight, *gradients)


@add_norm_gradients.register_fake
def _(dtotal, dy, total, weight, bias, mean, rstd, plan, kind, learns):
    width = total.shape[-1]
    db = weight.new_empty(0) if bias is None else bias.new_empty(width if learns else 0)
    return total.new_empty(total.shape), weight.new_empty(width if learns else 0), db


def _add_gradients(dtotal, dy, total, *inputs):
    """Gradients of the dispatcher's op, which passes None for an unused output."""
    *saved, wanted = inputs
    dtotal, dy = (torch.zeros_like(total) if d is None else d for d in (dtotal, dy))
    dx, *learned = add_norm_gradients(dtotal, dy, total, *saved, wanted[2] or wanted[3])
    return dx, dx, *learned


register(add_norm, _add_keep, _add_gradients, differentiable=2)


@triton.jit(do_not_specialize=["tokens"])
def norm_forward(
    x, residual, weight, bias, total, y, mean, rstd, tokens, eps, CENTERED: tl.constexpr, ADDED: tl.constexpr,
    WIDTH: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """ADDED: of x + residual, rounded to their dtype, which becomes `total`."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    column = tl.arange(0, BD)
    inside = (token < tokens)[:, None] & (column < WIDTH)[None, :]
    offsets = token[:, None] * WIDTH + column[None, :]
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        value += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + offsets, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if CENTERED:
        center = tl.sum(value, 1) / WIDTH
        tl.store(mean + token, center, mask=token < tokens)
        value = tl.where(inside, value - center[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)
    tl.store(rstd + token, scale, mask=token < tokens)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    out = value * scale[:, None] * w[None, :]
    if CENTERED:
        out += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    tl.store(y + offsets, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "strip"])
def norm_backward(
    x, dtotal, dy, weight, mean, rstd, factors, dx, sums, tokens, strip, CENTERED: tl.constexpr, ADDED: tl.constexpr,
    SUMMED: tl.constexpr, MASKED: tl.constexpr, WIDTH: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """sums fp32 [1 or 2, strips, WIDTH]: for the weight, for the bias. `strip`: tokens, a multiple of BT. ADDED: dX
    is the norm's plus `dtotal`, added in fp32."""
    column = tl.arange(0, BD)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    dw = tl.zeros([BT, BD], dtype=tl.float32)
    db = tl.zeros([BT, BD], dtype=tl.float32)
    for start in range(0, strip, BT):
        token = tl.program_id(0).to(tl.int64) * strip + start + tl.arange(0, BT)
        inside = (token < tokens)[:, None] & (column < WIDTH)[None, :]
        offsets = token[:, None] * WIDTH + column[None, :]
        value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        out = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + token, mask=token < tokens, other=0.0)[:, None]
        if CENTERED:
            value -= tl.load(mean + token, mask=token < tokens, other=0.0)[:, None]
        normalized = tl.where(inside, value * scale, 0.0)
        dn = out * w[None, :]
        d = dn - normalized * (tl.sum(dn * normalized, 1) / WIDTH)[:, None]
        if CENTERED:
            d -= (tl.sum(dn, 1) / WIDTH)[:, None]
        d *= scale
        if ADDED:
            d += tl.load(dtotal + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + offsets, d.to(dx.dtype.element_ty), mask=inside)
        if SUMMED:
            learned = out * normalized
            if MASKED:
                factor = tl.load(factors + token, mask=token < tokens, other=0.0)[:, None]
                learned = tl.where(factor == 0.0, 0.0, learned * factor)
                out = tl.where(factor == 0.0, 0.0, out * factor)
            dw += learned
            if CENTERED:
                db += out
    if SUMMED:
        offsets = tl.program_id(0) * WIDTH + column
        tl.store(sums + offsets, tl.sum(dw, 0), mask=column < WIDTH)
        if CENTERED:
            tl.store(sums + tl.num_programs(0) * WIDTH + offsets, tl.sum(db, 0), mask=column < WIDTH)


@triton.jit(do_not_specialize=["strips"])
def norm_sums(sums, dw, db, strips, WIDTH: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr):
    """Add the sums of all strips, the weight's (second program index 0) or the bias's (1)."""
    column = tl.program_id(0) * BD + tl.arange(0, BD)
    total = tl.zeros([BS, BD], dtype=tl.float32)
    for start in range(0, strips, BS):
        strip = start + tl.arange(0, BS)
        inside = (strip < strips)[:, None] & (column < WIDTH)[None, :]
        offsets = (tl.program_id(1) * strips + strip)[:, None] * WIDTH + column[None, :]
        total += tl.load(sums + offsets, mask=inside, other=0.0)
    total = tl.sum(total, 0)
    if tl.program_id(1) == 0:
        tl.store(dw + column, total.to(dw.dtype.element_ty), mask=column < WIDTH)
    else:
        tl.store(db + column, total.to(db.dtype.element_ty), mask=column < WIDTH)
