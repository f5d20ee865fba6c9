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
    if len(bounds) == 2:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _SwiGLU.apply(x, plan, bounds)


def linear_gelu(x, weight, bias, plan: MaskPlan, bounds):
    return gelu(linear_in(x, weight, bias, plan, "mlp_in", bounds, overwrite=True), plan, bounds)


def _groups(bounds: tuple[int, ...]):
    return enumerate(pairwise(bounds))


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, plan, bounds):
        x = x.contiguous()  # and dh below: what is scaled in place must be the result itself, never a copy of it
        ctx.save_for_backward(x)
        ctx.plan, ctx.bounds = plan, bounds
        h = F.gelu(x, approximate="tanh")
        for group, (start, end) in _groups(bounds):
            scale_columns_(h.view(plan.tokens, -1), plan, start, end, plan.column("active", group))
        return h

    @staticmethod
    def backward(ctx, dh):
        (x,) = ctx.saved_tensors
        plan = ctx.plan
        dx = torch.ops.aten.gelu_backward(dh.contiguous(), x, approximate="tanh")
        for group, (start, end) in _groups(ctx.bounds):
            factors = products(plan.column("active", group), plan.column("route", group))
            scale_columns_(dx.view(plan.tokens, -1), plan, start, end, factors)
        return dx, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, plan, bounds):
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.plan, ctx.bounds = plan, bounds
        h = x.new_empty(*x.shape[:-1], bounds[-1])
        for group, (start, end) in _groups(bounds):
            gate, up = x[..., 2 * start : 2 * end].chunk(2, dim=-1)
            torch.mul(F.silu(gate), up, out=h[..., start:end])
            scale_columns_(h.view(plan.tokens, -1), plan, start, end, plan.column("active", group))
        return h

    @staticmethod
    def backward(ctx, dh):
        (x,) = ctx.saved_tensors
        plan = ctx.plan
        dx = torch.empty_like(x)
        for group, (start, end) in _groups(ctx.bounds):
            gate, up = x[..., 2 * start : 2 * end].chunk(2, dim=-1)
            dgate, dup = dx[..., 2 * start : 2 * end].chunk(2, dim=-1)
            dh_g = dh[..., start:end]
            torch.mul(dh_g, F.silu(gate), out=dup)
            dgate.copy_(torch.ops.aten.silu_backward(dh_g * up, gate))
            factors = products(plan.column("active", group), plan.column("route", group))
            scale_columns_(dx.view(plan.tokens, -1), plan, 2 * start, 2 * end, factors)
        return dx, None, None
