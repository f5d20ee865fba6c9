"""Masked linear layers on cuBLAS, with Triton where a mask or a masked sum would cost a pass of its own.

Forward, dX, and dW where nothing is masked or the tokens form few slices, are the matmuls of runs.py. The bias sums of
a layer are one launch over all row ranges, which does not read what is masked, and a small one that adds the partial
sums. For labels that change from token to token there are two candidates for dW, chosen by SGTM_LINEAR:

`masked` (default)  the entries that may not update are zeroed (or scaled) in the pass that sums the bias: linear_in
                    does so to dY once dX has been computed, linear_out to a copy of X, whose columns are the rows of
                    dW. Then one plain matmul.
`rectangles`        a persistent GEMM over (token range x row range) rectangles, see rectangles.py
"""

from __future__ import annotations

import os
from itertools import product

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.library import custom_op

from sgtm_kernels import strips
from sgtm_kernels.aot import Launch
from sgtm_kernels.linear import rectangles
from sgtm_kernels.linear.runs import weight_gradient
from sgtm_kernels.plan import MAX_SLICES, MaskPlan, RowWork, plan_of
from sgtm_kernels.strips import STRIP, partial_sums, total_of
from sgtm_kernels.tiles import factor_of, place

CANDIDATES = ("masked", "rectangles")
TOKENS, COLUMNS = 32, 128  # of a tile


def candidate() -> str:
    """How dW is computed for labels that change from token to token."""
    chosen = os.environ.get("SGTM_LINEAR") or CANDIDATES[0]
    if chosen not in CANDIDATES:
        raise ValueError(f"SGTM_LINEAR: unknown way {chosen!r} to compute dW; known: {', '.join(CANDIDATES)}")
    return chosen


def linear_in(x, weight, bias, plan: MaskPlan, part: str, bounds, overwrite: bool):
    if len(bounds) == 2:
        return F.linear(x, weight, bias)
    return masked_linear_in(x, weight, bias, plan.handle, part, bounds, overwrite)


def linear_out(x, weight, bias, plan: MaskPlan, part: str, bounds):
    if len(bounds) == 2:
        return F.linear(x, weight.t(), bias)
    return masked_linear_out(x, weight, bias, plan.handle, part, bounds)


MASKS = "Tensor plan, str part, int[] bounds"


@custom_op(
    "sgtm::linear_in",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, {MASKS}, bool overwrite) -> Tensor",
)
def masked_linear_in(x, weight, bias, plan, part, bounds, overwrite):
    return F.linear(x, weight, bias)


@masked_linear_in.register_fake
def _(x, weight, bias, plan, part, bounds, overwrite):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@custom_op("sgtm::linear_out", mutates_args=(), schema=f"(Tensor x, Tensor weight, Tensor? bias, {MASKS}) -> Tensor")
def masked_linear_out(x, weight, bias, plan, part, bounds):
    return F.linear(x, weight.t(), bias)


@masked_linear_out.register_fake
def _(x, weight, bias, plan, part, bounds):
    return x.new_empty(*x.shape[:-1], weight.shape[1])


GRADIENTS = f"Tensor x, Tensor weight, {MASKS}, bool[3] wanted) -> (Tensor, Tensor, Tensor)"


@custom_op("sgtm::linear_in_backward", mutates_args=(), schema=f"(Tensor dy, {GRADIENTS}")
def linear_in_backward(dy, x, weight, plan, part, bounds, wanted):
    return _linear_in_backward(dy, x, weight, plan, part, bounds, wanted, overwrite=False)


@custom_op("sgtm::linear_in_backward_", mutates_args=("dy",), schema=f"(Tensor(a!) dy, {GRADIENTS}")
def linear_in_backward_(dy, x, weight, plan, part, bounds, wanted):
    return _linear_in_backward(dy, x, weight, plan, part, bounds, wanted, overwrite=True)


def _linear_in_backward(dy, x, weight, plan, part, bounds, wanted, overwrite):
    plan = plan_of(plan)
    dx = dy @ weight if wanted[0] else dy.new_empty(0)
    packed = dy.contiguous()
    dy2, x2 = packed.flatten(0, 1), x.flatten(0, 1)
    work = plan.rows(part, bounds)
    by_group = plan.contributions(part, len(bounds) - 1)
    dw = db = None
    if wanted[1]:
        if not _token_level(work):
            dw = weight_gradient(dy2, x2, plan, work)
        elif candidate() == "rectangles":
            dw = rectangles.weight_gradient(dy2, x2.contiguous(), plan, work)
        else:
            # autograd may hand one tensor to several ops. Only a copy made here, and what the caller promises that
            # nobody else uses, may be written to; from here on dy2 must not be read as the gradient.
            out = dy2 if overwrite or packed is not dy else torch.empty_like(dy2)
            partial = partial_sums(*dy2.shape, dy.device) if wanted[2] else None
            _scale_and_sum(dy2, out, partial, plan.factors(by_group, dy.device), bounds)
            dw = out.t() @ x2
            db = total_of(partial, dy.dtype) if wanted[2] else None
    if wanted[2] and db is None:
        db = bias_sum(dy2, plan, by_group, bounds)
    return dx, *(dy.new_empty(0) if gradient is None else gradient for gradient in (dw, db))


@custom_op("sgtm::linear_out_backward", mutates_args=(), schema=f"(Tensor dy, {GRADIENTS}")
def linear_out_backward(dy, x, weight, plan, part, bounds, wanted):
    plan = plan_of(plan)
    dx = dy @ weight.t() if wanted[0] else dy.new_empty(0)
    x2, dy2 = x.flatten(0, 1).contiguous(), dy.flatten(0, 1).contiguous()
    work = plan.rows(part, bounds)
    joint = plan.joint(f"{part}_bias")
    dw = db = None
    if wanted[1]:
        if not _token_level(work):
            dw = weight_gradient(x2, dy2, plan, work)
        elif candidate() == "rectangles":
            dw = rectangles.weight_gradient(x2, dy2, plan, work)
        else:
            out = torch.empty_like(x2)  # never in place: X belongs to the forward pass
            factors = plan.factors(plan.contributions(part, len(bounds) - 1), dy.device)
            if wanted[2] and not plan.plain(joint):
                partial = partial_sums(*dy2.shape, dy.device)
                of_bias = plan.factors((joint.by_label,), dy.device)
                _scale_input_and_sum(x2, out, dy2, partial, factors, of_bias, bounds)
                db = total_of(partial, dy.dtype)
            else:
                _scale_and_sum(x2, out, None, factors, bounds)
            dw = out.t() @ dy2
    if wanted[2] and db is None:
        db = bias_sum(dy2, plan, (joint.by_label,), (0, dy.shape[-1]))
    return dx, *(dy.new_empty(0) if gradient is None else gradient for gradient in (dw, db))


@linear_in_backward.register_fake
@linear_in_backward_.register_fake
def _(dy, x, weight, plan, part, bounds, wanted):
    shapes = x.shape, weight.shape, weight.shape[:1]
    return tuple(dy.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))


@linear_out_backward.register_fake
def _(dy, x, weight, plan, part, bounds, wanted):
    shapes = x.shape, weight.shape, weight.shape[1:]
    return tuple(dy.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))


def _save(ctx, inputs, output):
    x, weight, _, plan, ctx.part, ctx.bounds, *overwrite = inputs
    ctx.overwrite = bool(overwrite and overwrite[0])
    ctx.save_for_backward(x, weight, plan)


def _gradients(backward, ctx, dy):
    wanted = ctx.needs_input_grad[:3]
    found = backward(dy, *ctx.saved_tensors, ctx.part, ctx.bounds, wanted)
    return tuple(gradient if want else None for gradient, want in zip(found, wanted, strict=True))


def _in_gradients(ctx, dy):
    backward = linear_in_backward_ if ctx.overwrite else linear_in_backward
    return *_gradients(backward, ctx, dy), None, None, None, None


def _out_gradients(ctx, dy):
    return *_gradients(linear_out_backward, ctx, dy), None, None, None


masked_linear_in.register_autograd(_in_gradients, setup_context=_save)
masked_linear_out.register_autograd(_out_gradients, setup_context=_save)


def _token_level(work: tuple[RowWork, ...]) -> bool:
    return any(len(tokens.slices) > MAX_SLICES for _, _, tokens in work)


def bias_sum(x: torch.Tensor, plan: MaskPlan, by_group: tuple[tuple[float, ...], ...], bounds) -> torch.Tensor:
    """Sum over the tokens of x [tokens, columns] times the weight of token and column, [columns]."""
    if all(by_label[run.label] == 1 for by_label in by_group for run in plan.runs):
        return x.sum(0)
    partial = partial_sums(*x.shape, x.device)
    _scale_and_sum(x, None, partial, plan.factors(by_group, x.device), bounds)
    return total_of(partial, x.dtype)


def _scale_and_sum(x, out, partial, factors, bounds) -> None:
    """`out` = x times its factors (None: not wanted; x itself: in place), `partial` = the sums of that (or None)."""
    tokens, columns = x.shape
    grid = (triton.cdiv(columns, COLUMNS), triton.cdiv(tokens, STRIP))
    scale_and_sum[grid](
        x, x if out is None else out, factors if partial is None else partial, factors, tokens, BOUNDS=tuple(bounds),
        SCALE=out is not None, IN_PLACE=out is x, SUM=partial is not None, BT=TOKENS, BC=COLUMNS, STRIP=STRIP,
    )  # fmt: skip


def _scale_input_and_sum(x, out, dy, partial, x_factors, dy_factors, bounds) -> None:
    tokens, columns = dy.shape
    grid = (triton.cdiv(bounds[-1], COLUMNS) + triton.cdiv(columns, COLUMNS), triton.cdiv(tokens, STRIP))
    scale_input_and_sum[grid](
        x, out, dy, partial, x_factors, dy_factors, tokens, BOUNDS=tuple(bounds), WIDTH=(0, columns), BT=TOKENS,
        BC=COLUMNS, STRIP=STRIP,
    )  # fmt: skip


@triton.jit
def _strip(
    x, out, partial, factors, tokens, block, strip, BOUNDS: tl.constexpr, SCALE: tl.constexpr, IN_PLACE: tl.constexpr,
    SUM: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Scale and sum `STRIP` tokens of one block of columns. A factor of 0 leaves 0, and the entry unread."""
    columns: tl.constexpr = BOUNDS[len(BOUNDS) - 1]
    column = block * BC + tl.arange(0, BC)
    group, _, _ = place(BOUNDS, column)
    total = tl.zeros([BC], dtype=tl.float32)
    for start in range(0, STRIP, BT):
        token = strip.to(tl.int64) * STRIP + start + tl.arange(0, BT)
        inside = (token < tokens)[:, None] & (column < columns)[None, :]
        factor = factor_of(factors, tokens, token, group, BOUNDS)
        at = token[:, None] * columns + column[None, :]
        value = tl.load(x + at, mask=inside & (factor != 0.0), other=0.0).to(tl.float32) * factor
        if SCALE:
            written = inside & (factor != 1.0) if IN_PLACE else inside
            tl.store(out + at, value.to(out.dtype.element_ty), mask=written)
        if SUM:
            total += tl.sum(value, axis=0)
    if SUM:
        tl.store(partial + strip.to(tl.int64) * columns + column, total, mask=column < columns)


@triton.jit
def scale_and_sum(
    x, out, partial, factors, tokens, BOUNDS: tl.constexpr, SCALE: tl.constexpr, IN_PLACE: tl.constexpr,
    SUM: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    block, strip = tl.program_id(0), tl.program_id(1)
    _strip(x, out, partial, factors, tokens, block, strip, BOUNDS, SCALE, IN_PLACE, SUM, BT, BC, STRIP)


@triton.jit
def scale_input_and_sum(
    x, out, dy, partial, x_factors, dy_factors, tokens, BOUNDS: tl.constexpr, WIDTH: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """The first blocks scale a copy of x, the others sum dy by its factors."""
    blocks: tl.constexpr = (BOUNDS[len(BOUNDS) - 1] + BC - 1) // BC
    block, strip = tl.program_id(0), tl.program_id(1)
    if block < blocks:
        _strip(x, out, partial, x_factors, tokens, block, strip, BOUNDS, True, False, False, BT, BC, STRIP)
    else:
        _strip(dy, dy, partial, dy_factors, tokens, block - blocks, strip, WIDTH, False, False, True, BT, BC, STRIP)


def launches() -> list[Launch]:
    """Everything that dispatch can launch, for the ahead-of-time suite."""
    found = []
    tile = {"BT": TOKENS, "BC": COLUMNS, "STRIP": STRIP}
    ways = [flags for flags in product((False, True), repeat=3) if flags[0] >= flags[1] and flags[0] | flags[2]]
    for dtype in ("bf16", "fp32"):
        pointers = {"x": f"*{dtype}", "out": f"*{dtype}", "partial": "*fp32", "factors": "*fp32", "tokens": "i32"}
        both = dict.fromkeys(("x", "out", "dy"), f"*{dtype}")
        both |= dict.fromkeys(("partial", "x_factors", "dy_factors"), "*fp32") | {"tokens": "i32"}
        for bounds in ((0, 4096), (0, 960, 1024), (0, 24, 48, 771, 3000)):
            for scale, in_place, add in ways if len(bounds) > 2 else [(False, False, True)]:
                constants = {"BOUNDS": bounds, "SCALE": scale, "IN_PLACE": in_place, "SUM": add, **tile}
                found.append(Launch(scale_and_sum, pointers, constants, unaligned=("tokens",)))
            if len(bounds) > 2:
                constants = {"BOUNDS": bounds, "WIDTH": (0, 1024), **tile}
                found.append(Launch(scale_input_and_sum, both, constants, unaligned=("tokens",)))
    return found + strips.launches() + rectangles.launches()
