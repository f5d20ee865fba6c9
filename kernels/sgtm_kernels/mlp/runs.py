"""The MLP's non-linearity on slices: one dense pass, then the blocks (label run x group) that differ from 1 are
scaled."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from sgtm_kernels.linear.runs import linear_in
from sgtm_kernels.plan import MaskPlan
from sgtm_kernels.scale import products, scale_columns_


def gelu(x, plan: MaskPlan, bounds):
    if len(bounds) == 2:
        return F.gelu(x, approximate="tanh")
    return _Gelu.apply(x, plan, bounds)


def swiglu(x, plan: MaskPlan, bounds):
    return _SwiGLU.apply(x, plan, bounds)


def linear_gelu(x, weight, bias, plan: MaskPlan, bounds):
    return gelu(linear_in(x, weight, bias, plan, "mlp_in", bounds, overwrite=True), plan, bounds)


def _groups(bounds: tuple[int, ...]):
    return enumerate(pairwise(bounds))


def _scale_(x: torch.Tensor, plan: MaskPlan, bounds: tuple[int, ...], rows: int, backward: bool) -> None:
    """Multiply the columns of each group, `rows` per neuron, by `active`, in the backward pass by `route` as well.

    x [B, S, rows * neurons], in place. A layer without groups is left alone.
    """
    for group, (start, end) in _groups(bounds if len(bounds) > 2 else ()):
        factors = plan.column("active", group)
        if backward:
            factors = products(factors, plan.column("route", group))
        scale_columns_(x.view(plan.tokens, -1), plan, rows * start, rows * end, factors)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, plan, bounds):
        x = x.contiguous()  # and dh below: what is scaled in place must be the result itself, never a copy of it
        ctx.save_for_backward(x)
        ctx.plan, ctx.bounds = plan, bounds
        h = F.gelu(x, approximate="tanh")
        _scale_(h, plan, bounds, 1, backward=False)
        return h

    @staticmethod
    def backward(ctx, dh):
        (x,) = ctx.saved_tensors
        dx = torch.ops.aten.gelu_backward(dh.contiguous(), x, approximate="tanh")
        _scale_(dx, ctx.plan, ctx.bounds, 1, backward=True)
        return dx, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, plan, bounds):
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.plan, ctx.bounds = plan, bounds
        h = x.new_empty(*x.shape[:-1], bounds[-1])
        for _, (start, end) in _groups(bounds):
            gate, up = x[..., 2 * start : 2 * end].chunk(2, dim=-1)
            torch.ops.aten.silu.out(gate, out=h[..., start:end]).mul_(up)
        _scale_(h, plan, bounds, 1, backward=False)
        return h

    @staticmethod
    def backward(ctx, dh):
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        for _, (start, end) in _groups(ctx.bounds):
            gate, up = x[..., 2 * start : 2 * end].chunk(2, dim=-1)
            dgate, dup = dx[..., 2 * start : 2 * end].chunk(2, dim=-1)
            dh_g = dh[..., start:end]
            torch.ops.aten.silu.out(gate, out=dup).mul_(dh_g)
            torch.mul(dh_g, up, out=dgate)
            torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        _scale_(dx, ctx.plan, ctx.bounds, 2, backward=True)
        return dx, None, None
