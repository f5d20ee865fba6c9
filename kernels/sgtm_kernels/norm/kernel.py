"""LayerNorm and RMSNorm in one Triton pass each way, the masked sums for weight and bias fused into the backward pass.

Backward reads x and dY once and writes dX for all tokens; a program walks a strip of tokens and keeps the sums of its
tokens, times their factors, in registers. A second, small kernel adds the strips' sums in order: no atomics. Where no
token is masked the kernel is compiled without factors, where all are it is compiled without sums. Multiplications and
additions are never contracted (`FUSION`), so that the bits of dX cannot depend on which of these it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import custom_op

from sgtm_kernels.launch import Launch
from sgtm_kernels.plan import MaskPlan, plan_of

TILE = 2048  # elements of a tile of tokens x columns; a wider row is a tile of its own
STRIPS = 512  # at most; more occupy more of the device and write more partial sums
SUM_STRIPS, SUM_COLUMNS = 32, 64  # of a tile of the second pass
WIDTHS = (256, 768, 1024, 2048, 8192)  # of `launches`: of the models that are timed, and the widest
FUSION = {"enable_fp_fusion": False}
SPILL = "on sm_100 ptxas keeps one address in memory to stay at 48 registers, which lets more programs run at once"


def layer_norm(x, weight, bias, eps, plan: MaskPlan, kind):
    return norm(x, weight, bias, plan.handle, kind, eps)[0]


def rms_norm(x, weight, eps, plan: MaskPlan, kind):
    return norm(x, weight, None, plan.handle, kind, eps)[0]


def _shape(width: int) -> tuple[dict[str, int], int]:
    """Tile of a norm of this width, and its number of warps: 16 elements of the tile for each thread."""
    columns = triton.next_power_of_2(width)
    tokens = max(1, TILE // columns)
    return {"WIDTH": width, "BT": tokens, "BD": columns}, max(4, tokens * columns // 512)


@custom_op(
    "sgtm::norm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor plan, str? kind, float eps) -> (Tensor, Tensor, Tensor)",
)
def norm(x, weight, bias, plan, kind, eps):
    """LayerNorm, or RMSNorm without a bias; and the mean (of LayerNorm) and the inverse deviation of each token."""
    tokens, centered = x.shape[:-1].numel(), bias is not None
    x, weight, shift = x.contiguous(), weight.contiguous(), (bias if centered else weight).contiguous()
    y = torch.empty_like(x)
    shape, warps = _shape(x.shape[-1])
    rstd = x.new_empty(tokens, dtype=torch.float32)
    mean = x.new_empty(tokens if centered else 0, dtype=torch.float32)
    grid = (triton.cdiv(tokens, shape["BT"]),)
    norm_forward[grid](
        x, weight, shift, y, mean if centered else rstd, rstd, tokens, eps, CENTERED=centered,
        **shape, num_warps=warps, **FUSION,
    )  # fmt: skip
    return y, mean, rstd


@norm.register_fake
def _(x, weight, bias, plan, kind, eps):
    tokens = x.shape[:-1].numel()
    counts = (0 if bias is None else tokens), tokens
    return x.new_empty(x.shape), *(x.new_empty(n, dtype=torch.float32) for n in counts)


@custom_op(
    "sgtm::norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor mean, Tensor rstd, Tensor plan, str? kind, "
    "bool wanted) -> (Tensor, Tensor, Tensor)",
)
def norm_gradients(dy, x, weight, bias, mean, rstd, plan, kind, wanted):
    """dX, and where `wanted` those of weight and bias."""
    x, dy, weight, plan, centered = (
        x.contiguous(),
        dy.contiguous(),
        weight.contiguous(),
        plan_of(plan),
        bias is not None,
    )
    learners = None if kind is None else plan.joint(kind)
    summed = wanted and (learners is None or bool(learners.slices))
    masked = summed and learners is not None and not plan.plain(learners)
    shape, warps = _shape(x.shape[-1])
    width, tile = shape["WIDTH"], shape["BT"]
    strip = triton.cdiv(triton.cdiv(plan.tokens, STRIPS), tile) * tile
    strips = triton.cdiv(plan.tokens, strip)
    factors = plan.factors([learners.by_label], x.device) if masked else rstd
    sums = torch.empty((1 + centered, strips, width) if summed else 1, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x)
    norm_backward[(strips,)](
        x, dy, weight, mean if centered else rstd, rstd, factors, dx, sums, plan.tokens, strip, CENTERED=centered,
        SUMMED=summed, MASKED=masked, **shape, num_warps=warps, **FUSION,
    )  # fmt: skip
    new = x.new_empty if summed else x.new_zeros
    dw = new(width if wanted else 0, dtype=weight.dtype)
    db = new(width if wanted and centered else 0, dtype=bias.dtype if centered else weight.dtype)
    if summed:
        grid = (triton.cdiv(width, SUM_COLUMNS), 1 + centered)
        norm_sums[grid](sums, dw, db if centered else dw, strips, WIDTH=width, BS=SUM_STRIPS, BD=SUM_COLUMNS, **FUSION)
    return dx, dw, db


@norm_gradients.register_fake
def _(dy, x, weight, bias, mean, rstd, plan, kind, wanted):
    width = x.shape[-1]
    db = weight.new_empty(0) if bias is None else bias.new_empty(width if wanted else 0)
    return x.new_empty(x.shape), weight.new_empty(width if wanted else 0), db


def _save(ctx, inputs, output):
    x, weight, bias, plan, ctx.kind, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd, plan)


def _gradients(ctx, dy, *_):
    saved, wanted = ctx.saved_tensors, any(ctx.needs_input_grad[1:3])
    dx, dw, db = norm_gradients(dy, *saved, ctx.kind, wanted)
    centered = saved[2] is not None
    return dx, dw if wanted else None, db if wanted and centered else None, None, None, None


norm.register_autograd(_gradients, setup_context=_save)


@triton.jit(do_not_specialize=["tokens"])
def norm_forward(
    x, weight, bias, y, mean, rstd, tokens, eps, CENTERED: tl.constexpr, WIDTH: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    column = tl.arange(0, BD)
    inside = (token < tokens)[:, None] & (column < WIDTH)[None, :]
    at = token[:, None] * WIDTH + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
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
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "strip"])
def norm_backward(
    x, dy, weight, mean, rstd, factors, dx, sums, tokens, strip, CENTERED: tl.constexpr, SUMMED: tl.constexpr,
    MASKED: tl.constexpr, WIDTH: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """sums fp32 [1 or 2, strips, WIDTH]: for the weight, for the bias. `strip`: tokens, a multiple of BT."""
    column = tl.arange(0, BD)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    dw = tl.zeros([BT, BD], dtype=tl.float32)
    db = tl.zeros([BT, BD], dtype=tl.float32)
    for start in range(0, strip, BT):
        token = tl.program_id(0).to(tl.int64) * strip + start + tl.arange(0, BT)
        inside = (token < tokens)[:, None] & (column < WIDTH)[None, :]
        at = token[:, None] * WIDTH + column[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        out = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + token, mask=token < tokens, other=0.0)[:, None]
        if CENTERED:
            value -= tl.load(mean + token, mask=token < tokens, other=0.0)[:, None]
        normalized = tl.where(inside, value * scale, 0.0)
        dn = out * w[None, :]
        d = dn - normalized * (tl.sum(dn * normalized, 1) / WIDTH)[:, None]
        if CENTERED:
            d -= (tl.sum(dn, 1) / WIDTH)[:, None]
        tl.store(dx + at, (d * scale).to(dx.dtype.element_ty), mask=inside)
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
        at = tl.program_id(0) * WIDTH + column
        tl.store(sums + at, tl.sum(dw, 0), mask=column < WIDTH)
        if CENTERED:
            tl.store(sums + tl.num_programs(0) * WIDTH + at, tl.sum(db, 0), mask=column < WIDTH)


@triton.jit(do_not_specialize=["strips"])
def norm_sums(sums, dw, db, strips, WIDTH: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr):
    """Add the sums of all strips, the weight's (second program index 0) or the bias's (1)."""
    column = tl.program_id(0) * BD + tl.arange(0, BD)
    total = tl.zeros([BS, BD], dtype=tl.float32)
    for start in range(0, strips, BS):
        strip = start + tl.arange(0, BS)
        inside = (strip < strips)[:, None] & (column < WIDTH)[None, :]
        at = (tl.program_id(1) * strips + strip)[:, None] * WIDTH + column[None, :]
        total += tl.load(sums + at, mask=inside, other=0.0)
    total = tl.sum(total, 0)
    if tl.program_id(1) == 0:
        tl.store(dw + column, total.to(dw.dtype.element_ty), mask=column < WIDTH)
    else:
        tl.store(db + column, total.to(db.dtype.element_ty), mask=column < WIDTH)


def launches() -> list[Launch]:
    """Every block size and flag, at some widths, in bf16 and fp32, for the ahead-of-time suite."""
    found = []
    for dtype in ("bf16", "fp32"):
        p, stat = f"*{dtype}", "*fp32"
        sums = {"sums": stat, "dw": p, "db": p, "strips": "i32"}
        constants = {"BS": SUM_STRIPS, "BD": SUM_COLUMNS}
        for width in WIDTHS if dtype == "bf16" else WIDTHS[::2]:
            found.append(Launch(norm_sums, sums, constants | {"WIDTH": width}, unaligned=("strips",), fp_fusion=False))
            shape, warps = _shape(width)
            for centered in (False, True):
                given = {"num_warps": warps, "unaligned": ("tokens", "strip"), "fp_fusion": False}
                forward = dict.fromkeys(("x", "weight", "bias", "y"), p) | dict.fromkeys(("mean", "rstd"), stat)
                forward |= {"tokens": "i32", "eps": "fp32"}
                found.append(Launch(norm_forward, forward, {"CENTERED": centered, **shape}, **given))
                backward = dict.fromkeys(("x", "dy", "weight"), p) | dict.fromkeys(("mean", "rstd", "factors"), stat)
                backward |= {"dx": p, "sums": stat, "tokens": "i32", "strip": "i32"}
                for summed, masked in ((True, False), (True, True), (False, False)):
                    flags = {"CENTERED": centered, "SUMMED": summed, "MASKED": masked}
                    spill = SPILL if (width, centered, summed, dtype) == (256, True, False, "bf16") else None
                    found.append(Launch(norm_backward, backward, flags | shape, **given, spill=spill))
    return found
