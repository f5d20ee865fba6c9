"""LayerNorm and RMSNorm in one Triton pass each way, the masked sums for weight and bias fused into the backward pass.

Backward reads x and dY once and writes dX for all tokens; a program walks a strip of tokens and keeps the sums of its
tokens, times their factors, in registers. A second, small kernel adds the strips' sums in order: no atomics. Where no
token is masked the kernel is compiled without factors, where all are it is compiled without sums. Multiplications and
additions are never contracted (`FUSION`), so that the bits of dX cannot depend on which of these it is.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch.library import custom_op

from sgtm_kernels.autograd import captured, eager, existing, register
from sgtm_kernels.launch import Launch
from sgtm_kernels.plan import MaskPlan, plan_of

TILE = 2048  # elements of a tile of tokens x columns; a wider row is a tile of its own
STRIPS = 512  # at most; more occupy more of the device and write more partial sums
SUM_STRIPS, SUM_COLUMNS = 32, 64  # of a tile of the second pass
WIDTHS = (256, 768, 1024, 2048, 8192)  # of `launches`: of the models that are timed, and the widest
FUSION = {"enable_fp_fusion": False}
SPILL = "on sm_100 ptxas keeps one address in memory to stay at 48 registers, which lets more programs run at once"


def layer_norm(x, weight, bias, eps, plan: MaskPlan, kind):
    return _norm(x, weight, bias, plan, kind, eps)


def rms_norm(x, weight, eps, plan: MaskPlan, kind):
    return _norm(x, weight, None, plan, kind, eps)


def _norm(x, weight, bias, plan: MaskPlan, kind, eps):
    if captured():
        return norm(x, weight, bias, plan.handle, kind, eps)[0]
    return eager_norm(x, weight, bias, plan, kind, eps)


@cache
def _shape(width: int) -> tuple[dict[str, int], int]:
    """Tile of a norm of this width, and its number of warps: 16 elements of the tile for each thread."""
    columns = triton.next_power_of_2(width)
    tokens = max(1, TILE // columns)
    return {"WIDTH": width, "BT": tokens, "BD": columns}, max(4, tokens * columns // 512)


def _forward(x, weight, bias, plan, kind, eps):
    """LayerNorm, or RMSNorm without a bias; and the mean (of LayerNorm) and the inverse deviation of each token."""
    x, weight, centered = x.contiguous(), weight.contiguous(), bias is not None
    y, tokens = torch.empty_like(x), x.numel() // x.shape[-1]
    shape, warps = _shape(x.shape[-1])
    rstd = x.new_empty(tokens, dtype=torch.float32)
    mean = x.new_empty(tokens, dtype=torch.float32) if centered else None
    norm_forward[(-(-tokens // shape["BT"]),)](
        x, weight, bias.contiguous() if centered else weight, y, mean if centered else rstd, rstd, tokens, eps,
        CENTERED=centered, **shape, num_warps=warps, **FUSION,
    )  # fmt: skip
    return y, mean, rstd


def _backward(dy, x, weight, bias, mean, rstd, plan, kind, wanted):
    """dX, and where wanted those of weight and bias."""
    x, dy, weight, centered = x.contiguous(), dy.contiguous(), weight.contiguous(), bias is not None
    wanted = wanted[1] or wanted[2]
    learners = None if kind is None else plan.joint(kind)
    summed = wanted and (learners is None or bool(learners.slices))
    masked = summed and learners is not None and not plan.plain(learners)
    shape, warps = _shape(x.shape[-1])
    width, tokens = shape["WIDTH"], plan.tokens
    strip = -(-tokens // STRIPS)
    strip += -strip % shape["BT"]
    strips = -(-tokens // strip)
    factors = plan.factors((learners.by_label,), x.device) if masked else rstd
    sums = x.new_empty((1 + centered, strips, width) if summed else 1, dtype=torch.float32)
    dx = torch.empty_like(x)
    norm_backward[(strips,)](
        x, dy, weight, mean if centered else rstd, rstd, factors, dx, sums, tokens, strip, CENTERED=centered,
        SUMMED=summed, MASKED=masked, **shape, num_warps=warps, **FUSION,
    )  # fmt: skip
    if not wanted:
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


eager_norm = eager(_forward, _keep, _backward)


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
    "bool wanted) -> (Tensor, Tensor, Tensor)",
)
def norm_gradients(dy, x, weight, bias, mean, rstd, plan, kind, wanted):
    return existing(weight, *_backward(dy, x, weight, bias, mean, rstd, plan_of(plan), kind, (True, wanted, wanted)))


@norm_gradients.register_fake
def _(dy, x, weight, bias, mean, rstd, plan, kind, wanted):
    width = x.shape[-1]
    db = weight.new_empty(0) if bias is None else bias.new_empty(width if wanted else 0)
    return x.new_empty(x.shape), weight.new_empty(width if wanted else 0), db


register(norm, _keep, lambda *inputs: norm_gradients(*inputs[:-1], inputs[-1][1] or inputs[-1][2]))


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
