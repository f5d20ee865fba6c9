"""The MLP's non-linearity on slices: one dense pass, then the blocks (label run x group) that differ from 1 are
scaled."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F

from sgtm_kernels.autograd import eager
from sgtm_kernels.linear.pytorch import in_backward
from sgtm_kernels.plan import MaskPlan
from sgtm_kernels.scale import scale_columns_


def gelu(x, plan: MaskPlan, bounds):
    if len(bounds) == 2 or not plan.signature.outputs:
        return F.gelu(x, approximate="tanh")
    return _gelu(x, plan, bounds)


def swiglu(x, plan: MaskPlan, bounds):
    return _swiglu(x, plan, bounds)


def linear_gelu(x, weight, bias, plan: MaskPlan, bounds):
    if len(bounds) == 2:
        return gelu(F.linear(x, weight, bias), plan, bounds)
    return _linear_gelu(x, weight, bias, plan, bounds, plan.rows("mlp_in", bounds))


def _scale_(x: torch.Tensor, plan: MaskPlan, bounds: tuple[int, ...], rows: int, table: str) -> torch.Tensor:
    """Multiply the columns of each group, `rows` per neuron, by its column of `table`, in place.

    x [B, S, rows * neurons]. A layer without groups is left alone.
    """
    if plan.signature.outputs and len(bounds) > 2:
        flat = x.view(plan.tokens, -1)
        for group, (start, end) in enumerate(pairwise(bounds)):
            scale_columns_(flat, plan, rows * start, rows * end, plan.column(table, group))
    return x


# Of what is scaled in place only the result itself will do, never a copy: hence `contiguous`.


def _gelu_forward(x, plan, bounds):
    return _scale_(F.gelu(x.contiguous(), approximate="tanh"), plan, bounds, 1, "active")


def _gelu_backward(dh, x, plan, bounds, wanted):
    dx = torch.ops.aten.gelu_backward.default(dh.contiguous(), x.contiguous(), approximate="tanh")
    return (_scale_(dx, plan, bounds, 1, "passes"),)


def _keep(inputs, output):
    x, plan, bounds = inputs
    return (x,), plan, (bounds,)


def _linear_gelu_forward(x, weight, bias, plan, bounds, work):
    pre = F.linear(x, weight, bias)
    return _gelu_forward(pre, plan, bounds), pre


def _linear_gelu_keep(inputs, outputs):
    x, weight, _, plan, *numbers = inputs
    return (x, weight, outputs[1]), plan, numbers


def _linear_gelu_backward(dh, x, weight, pre, plan, bounds, work, wanted):
    (dpre,) = _gelu_backward(dh, pre, plan, bounds, wanted)
    return in_backward(dpre, x, weight, plan, work, wanted)


@cache
def _sizes(bounds: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Neurons of the groups, and columns of the projection: for each group its gates and its ups."""
    sizes = tuple(end - start for start, end in pairwise(bounds))
    return sizes, tuple(size for size in sizes for _ in range(2))


def _swiglu_forward(x, plan, bounds):
    h = x.new_empty(*x.shape[:-1], bounds[-1])
    neurons, columns = _sizes(bounds)
    parts = x.split_with_sizes(columns, -1)
    for gate, up, out in zip(parts[::2], parts[1::2], h.split_with_sizes(neurons, -1), strict=True):
        torch.mul(F.silu(gate), up, out=out)
    return _scale_(h, plan, bounds, 1, "active")


def _swiglu_backward(dh, x, plan, bounds, wanted):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    neurons, columns = _sizes(bounds)
    parts, dparts = x.split_with_sizes(columns, -1), dx.split_with_sizes(columns, -1)
    for i, dh_g in enumerate(dh.split_with_sizes(neurons, -1)):
        gate, up = parts[2 * i : 2 * i + 2]
        dgate, dup = dparts[2 * i : 2 * i + 2]
        torch.mul(F.silu(gate), dh_g, out=dup)
        torch.mul(dh_g, up, out=dgate)
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
    return (_scale_(dx, plan, bounds, 2, "passes"),)


_gelu = eager(_gelu_forward, _keep, _gelu_backward)
_linear_gelu = eager(_linear_gelu_forward, _linear_gelu_keep, _linear_gelu_backward)
_swiglu = eager(_swiglu_forward, _keep, _swiglu_backward)
