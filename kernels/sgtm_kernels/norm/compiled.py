"""Norms in a compiled graph: the compiler sees both passes, but for the masked sums over tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sgtm_kernels.linear.compiled import joint_sum
from sgtm_kernels.plan import MaskPlan
from sgtm_kernels.signature import masked


def layer_norm(x, weight, bias, eps, plan: MaskPlan, kind):
    if kind is None or not masked(plan, kind):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return _LayerNorm.apply(x, weight, bias, eps, plan.handle, kind)


def rms_norm(x, weight, eps, plan: MaskPlan, kind):
    return _RMSNorm.apply(x, weight, eps, plan.handle, kind if masked(plan, kind) else None)


def add_layer_norm(x, residual, weight, bias, eps, plan: MaskPlan, kind):
    total = x + residual
    return total, layer_norm(total, weight, bias, eps, plan, kind)


def add_rms_norm(x, residual, weight, eps, plan: MaskPlan, kind):
    total = x + residual
    return total, rms_norm(total, weight, eps, plan, kind)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, plan, kind):
        y, mean, rstd = torch.ops.aten.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd, plan)
        ctx.kind, ctx.eps = kind, eps
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, rstd, plan = ctx.saved_tensors
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            dy, x, weight.shape, mean, rstd, weight, bias, [True, False, False]
        )
        # Not from the saved statistics: on a CPU those of a bf16 input are in bf16.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normalized = F.layer_norm(wide, weight.shape, eps=ctx.eps)
        dw, db = joint_sum(normalized * dy, plan, ctx.kind), joint_sum(dy, plan, ctx.kind)
        return dx, dw.to(weight.dtype), db.to(bias.dtype), None, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, plan, kind):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd, plan)
        ctx.kind = kind
        return (wide * rstd * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd, plan = ctx.saved_tensors
        normalized = x.to(rstd.dtype) * rstd
        dy = dy.to(rstd.dtype)
        dn = dy * weight
        dx = (dn - normalized * (dn * normalized).mean(-1, keepdim=True)) * rstd
        terms = dy * normalized
        dw = terms.sum((0, 1)) if ctx.kind is None else joint_sum(terms, plan, ctx.kind)
        return dx.to(x.dtype), dw.to(weight.dtype), None, None, None
