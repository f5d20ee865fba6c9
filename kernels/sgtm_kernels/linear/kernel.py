"""Masked linear layers on cuBLAS, with Triton where a mask or a masked sum would cost a pass of its own.

Forward, dX, and dW where nothing is masked or the tokens form few slices, are the matmuls of pytorch.py. The bias sums
of a layer are one launch over all row ranges, which does not read what is masked, and a small one that adds the partial
sums. For labels that change from token to token there are two algorithms for dW, chosen by SGTM_LINEAR, else by what
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

from sgtm_kernels.autograd import captured, eager, existing, register
from sgtm_kernels.dispatch import algorithm
from sgtm_kernels.linear import rectangles, scaling
from sgtm_kernels.linear.pytorch import BIAS_KIND, weight_gradient
from sgtm_kernels.plan import MAX_SLICES, MaskPlan, RowWork, plan_of
from sgtm_kernels.triton_common.tiles import total_of
from sgtm_kernels.triton_common.tuning import DTYPES, Tunable


class DwAlgorithm(NamedTuple):
    algorithm: str


# By dtype; the share of dW's work that the masks leave, in quarters rounded up; the mean length of the slices, up to.
LENGTHS = (64, 256, 1024)  # the last one: and above
DW_ALGORITHM = Tunable(
    "linear_dw",
    lambda dtype, quarters, length: DwAlgorithm("masked"),
    {key: (DwAlgorithm("rectangles"),) for key in product(("bf16",), (2, 3, 4), LENGTHS)},
)


def dw_algorithm(x: torch.Tensor, buckets: tuple[int, int]) -> str:
    """The algorithm of dW for labels that change from token to token; x: an operand, buckets: of the masks."""
    return algorithm("SGTM_LINEAR") or DW_ALGORITHM(x.device, DTYPES[x.dtype], *buckets).algorithm


def _share_and_length(work: tuple[RowWork, ...], tokens: int) -> tuple[int, int]:
    """The buckets of `DW_ALGORITHM`; slices count where they are too many for matmuls of their own."""
    counts = [sum(end - start for start, end, _ in rows.tokens.slices) for rows in work]
    done = sum((rows.end - rows.start) * n for rows, n in zip(work, counts, strict=True))
    whole = tokens * sum(rows.end - rows.start for rows in work)
    means = [n // len(rows.tokens.slices) for rows, n in zip(work, counts, strict=True) if _many(rows)]
    return max(1, -(-4 * done // whole)), next((n for n in LENGTHS if n >= min(means)), LENGTHS[-1])


def linear_in(x, weight, bias, plan: MaskPlan, projection: str, bounds, overwrite: bool):
    if len(bounds) == 2:
        return F.linear(x, weight, bias)
    if captured():
        return masked_linear_in(x, weight, bias, plan.handle, projection, bounds, overwrite)
    return eager_linear_in(x, weight, bias, plan, projection, bounds, overwrite)


def linear_out(x, weight, bias, plan: MaskPlan, projection: str, bounds):
    if len(bounds) == 2:
        return F.linear(x, weight.t(), bias)
    if captured():
        return masked_linear_out(x, weight, bias, plan.handle, projection, bounds)
    return eager_linear_out(x, weight, bias, plan, projection, bounds)


def _work(
    plan: MaskPlan, projection: str, bounds: tuple[int, ...]
) -> tuple[tuple[RowWork, ...], tuple[int, int] | None]:
    """The work of dW; and the buckets of `DW_ALGORITHM` where the tokens of some rows form too many slices."""

    def make():
        rows = plan.rows(projection, bounds)
        return rows, _share_and_length(rows, plan.tokens) if any(map(_many, rows)) else None

    return plan.cached(("linear", projection, bounds), make)


def _many(rows: RowWork) -> bool:
    return len(rows.tokens.slices) > MAX_SLICES


def _in_forward(x, weight, bias, plan, projection, bounds, overwrite):
    return F.linear(x, weight, bias)


def _out_forward(x, weight, bias, plan, projection, bounds):
    return F.linear(x, weight.t(), bias)


def _keep(inputs, output):
    x, weight, _, plan, *numbers = inputs
    return (x, weight), plan, numbers


def in_backward(dy, x, weight, plan, projection, bounds, overwrite, wanted):
    dx = dy @ weight if wanted[0] else None
    packed = dy.contiguous()
    dy2, x2 = packed.flatten(0, 1), x.flatten(0, 1)
    rows, buckets = _work(plan, projection, bounds)
    factors = plan.mask(projection, len(bounds) - 1, dy.device)
    dw = db = None
    if wanted[1]:
        if buckets is None:
            dw = weight_gradient(dy2, x2, plan, rows)
        elif dw_algorithm(dy2, buckets) == "rectangles":
            dw = rectangles.weight_gradient(dy2, x2.contiguous(), plan, rows)
        else:
            # autograd may hand one tensor to several ops. Only a copy made here, and what the caller promises that
            # no other op uses, may be written to; from here on dy2 must not be read as the gradient.
            out = dy2 if overwrite or packed is not dy else torch.empty_like(dy2)
            partial = scaling.sums_of(dy2) if wanted[2] else None
            scaling.scale_sum(dy2, out, partial, factors, bounds)
            dw = out.t() @ x2
            db = None if partial is None else total_of(partial, dy.dtype)
    if wanted[2] and db is None:
        db = scaling.masked_sum(dy2, factors, bounds)
    return dx, dw, db


def _out_backward(dy, x, weight, plan, projection, bounds, wanted):
    dx = dy @ weight.t() if wanted[0] else None
    x2, dy2 = x.flatten(0, 1).contiguous(), dy.flatten(0, 1).contiguous()
    rows, buckets = _work(plan, projection, bounds)
    of_bias = plan.mask(BIAS_KIND[projection], 1, dy.device) if wanted[2] else None
    dw = db = None
    if wanted[1]:
        if buckets is None:
            dw = weight_gradient(x2, dy2, plan, rows)
        elif dw_algorithm(dy2, buckets) == "rectangles":
            dw = rectangles.weight_gradient(x2, dy2, plan, rows)
        else:
            out = torch.empty_like(x2)  # never in place: X belongs to the forward pass
            factors = plan.mask(projection, len(bounds) - 1, dy.device)
            if of_bias is not None:
                partial = scaling.sums_of(dy2)
                scaling.scale_input_sum(x2, out, dy2, partial, factors, of_bias, bounds)
                db = total_of(partial, dy.dtype)
            else:
                scaling.scale_sum(x2, out, None, factors, bounds)
            dw = out.t() @ dy2
    if wanted[2] and db is None:
        slices = plan.joint(BIAS_KIND[projection]).slices
        if len(slices) == 1 and slices[0].weight == 1:  # one launch, where scaling would take two
            db = dy2[slices[0].start : slices[0].end].sum(0)
        else:
            db = scaling.masked_sum(dy2, of_bias, (0, dy.shape[-1]))
    return dx, dw, db


eager_linear_in = eager(_in_forward, _keep, in_backward)
eager_linear_out = eager(_out_forward, _keep, _out_backward)


MASKS = "Tensor plan, str projection, int[] bounds"
GRADIENTS = f"Tensor x, Tensor weight, {MASKS}, bool[3] wanted) -> (Tensor, Tensor, Tensor)"


@custom_op(
    "sgtm::linear_in",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, {MASKS}, bool overwrite) -> Tensor",
)
def masked_linear_in(x, weight, bias, plan, projection, bounds, overwrite):
    return F.linear(x, weight, bias)


@masked_linear_in.register_fake
def _(x, weight, bias, plan, projection, bounds, overwrite):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@custom_op("sgtm::linear_out", mutates_args=(), schema=f"(Tensor x, Tensor weight, Tensor? bias, {MASKS}) -> Tensor")
def masked_linear_out(x, weight, bias, plan, projection, bounds):
    return F.linear(x, weight.t(), bias)


@masked_linear_out.register_fake
def _(x, weight, bias, plan, projection, bounds):
    return x.new_empty(*x.shape[:-1], weight.shape[1])


@custom_op("sgtm::linear_in_backward", mutates_args=(), schema=f"(Tensor dy, {GRADIENTS}")
def linear_in_backward(dy, x, weight, plan, projection, bounds, wanted):
    return existing(dy, *in_backward(dy, x, weight, plan_of(plan), projection, tuple(bounds), False, wanted))


@custom_op("sgtm::linear_in_backward_", mutates_args=("dy",), schema=f"(Tensor(a!) dy, {GRADIENTS}")
def linear_in_backward_(dy, x, weight, plan, projection, bounds, wanted):
    return existing(dy, *in_backward(dy, x, weight, plan_of(plan), projection, tuple(bounds), True, wanted))


@custom_op("sgtm::linear_out_backward", mutates_args=(), schema=f"(Tensor dy, {GRADIENTS}")
def linear_out_backward(dy, x, weight, plan, projection, bounds, wanted):
    return existing(dy, *_out_backward(dy, x, weight, plan_of(plan), projection, tuple(bounds), wanted))


@linear_in_backward.register_fake
@linear_in_backward_.register_fake
def _(dy, x, weight, plan, projection, bounds, wanted):
    shapes = x.shape, weight.shape, weight.shape[:1]
    return tuple(dy.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))


@linear_out_backward.register_fake
def _(dy, x, weight, plan, projection, bounds, wanted):
    shapes = x.shape, weight.shape, weight.shape[1:]
    return tuple(dy.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))


def _captured_in(dy, x, weight, plan, projection, bounds, overwrite, wanted):
    backward = linear_in_backward_ if overwrite else linear_in_backward
    return backward(dy, x, weight, plan, projection, bounds, wanted[:3])


def _captured_out(dy, x, weight, plan, projection, bounds, wanted):
    return linear_out_backward(dy, x, weight, plan, projection, bounds, wanted[:3])


register(masked_linear_in, _keep, _captured_in)
register(masked_linear_out, _keep, _captured_out)
