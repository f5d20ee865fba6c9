"""Masked linear layers on cuBLAS, with Triton where a mask or a masked sum would cost a pass of its own.

Forward, dX, and dW where nothing is masked or the tokens form few slices, are the matmuls of runs.py. The bias sums of
a layer are one launch over all row ranges, which does not read what is masked, and a small one that adds the partial
sums. For labels that change from token to token there are two candidates for dW, chosen by SGTM_LINEAR, else by what
has been tuned:

`masked` (default)  the entries that may not update are zeroed (or scaled) in the pass that sums the bias: linear_in
                    does so to dY once dX has been computed, linear_out to a copy of X, whose columns are the rows of
                    dW. Then one plain matmul.
`rectangles`        a persistent GEMM over (token range x row range) rectangles, see rectangles.py
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.library import custom_op

from sgtm_kernels.dispatch import way
from sgtm_kernels.launch import Launch
from sgtm_kernels.linear import rectangles, scaling
from sgtm_kernels.linear.runs import weight_gradient
from sgtm_kernels.plan import MAX_SLICES, MaskPlan, RowWork, plan_of
from sgtm_kernels.strips import total_of
from sgtm_kernels.tuning import DTYPES, Tunable


class Way(NamedTuple):
    way: str


# By dtype; the share of dW's work that the masks leave, in quarters rounded up; the mean length of the slices, up to.
LENGTHS = (64, 256, 1024)  # the last one: and above
WAY = Tunable(
    "linear_dw",
    lambda dtype, quarters, length: Way("masked"),
    {key: (Way("rectangles"),) for key in product(("bf16",), (2, 3, 4), LENGTHS)},
)


def candidate(x: torch.Tensor, work: tuple[RowWork, ...]) -> str:
    """How dW is computed for labels that change from token to token; x [tokens, columns]: an operand."""
    return way("SGTM_LINEAR") or WAY(x.device, DTYPES[x.dtype], *_share_and_length(work, len(x))).way


def _share_and_length(work: tuple[RowWork, ...], tokens: int) -> tuple[int, int]:
    """The buckets of `WAY`; slices count where they are too many for matmuls of their own."""
    kept = [sum(end - start for start, end, _ in rows.tokens.slices) for rows in work]
    done = sum((rows.end - rows.start) * n for rows, n in zip(work, kept, strict=True))
    whole = tokens * sum(rows.end - rows.start for rows in work)
    short = [n // len(rows.tokens.slices) for rows, n in zip(work, kept, strict=True) if _many(rows)]
    return max(1, -(-4 * done // whole)), next((n for n in LENGTHS if n >= min(short)), LENGTHS[-1])


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
        elif candidate(dy2, work) == "rectangles":
            dw = rectangles.weight_gradient(dy2, x2.contiguous(), plan, work)
        else:
            # autograd may hand one tensor to several ops. Only a copy made here, and what the caller promises that
            # nobody else uses, may be written to; from here on dy2 must not be read as the gradient.
            out = dy2 if overwrite or packed is not dy else torch.empty_like(dy2)
            partial = scaling.sums_of(dy2) if wanted[2] else None
            scaling.scale_sum(dy2, out, partial, plan.factors(by_group, dy.device), bounds)
            dw = out.t() @ x2
            db = total_of(partial, dy.dtype) if wanted[2] else None
    if wanted[2] and db is None:
        db = scaling.bias_sum(dy2, plan, by_group, bounds)
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
        elif candidate(dy2, work) == "rectangles":
            dw = rectangles.weight_gradient(x2, dy2, plan, work)
        else:
            out = torch.empty_like(x2)  # never in place: X belongs to the forward pass
            factors = plan.factors(plan.contributions(part, len(bounds) - 1), dy.device)
            if wanted[2] and not plan.plain(joint):
                partial = scaling.sums_of(dy2)
                of_bias = plan.factors((joint.by_label,), dy.device)
                scaling.scale_input_sum(x2, out, dy2, partial, factors, of_bias, bounds)
                db = total_of(partial, dy.dtype)
            else:
                scaling.scale_sum(x2, out, None, factors, bounds)
            dw = out.t() @ dy2
    if wanted[2] and db is None:
        db = scaling.bias_sum(dy2, plan, (joint.by_label,), (0, dy.shape[-1]))
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
    return any(map(_many, work))


def _many(rows: RowWork) -> bool:
    return len(rows.tokens.slices) > MAX_SLICES


def launches() -> list[Launch]:
    """Every block size and flag, at some widths and bounds, in bf16 and fp32, for the ahead-of-time suite."""
    return scaling.launches() + rectangles.launches()
