"""Norms on slices: dX for all tokens, the weight's gradient over the token ranges that may update it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sgtm_kernels.linear.runs import token_sum
from sgtm_kernels.plan import MaskPlan


def layer_norm(x, weight, bias, eps, plan: MaskPlan, kind):
    if kind is None or plan.plain(plan.joint(kind)):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return _LayerNorm.apply(x, weight, bias, eps, plan, plan.joint(kind))


def rms_norm(x, weight, eps, plan: MaskPlan, kind):
    tokens = None if kind is None else plan.joint(kind)
    return _RMSNorm.apply(x, weight, eps, plan, tokens)


def add_layer_norm(x, residual, weight, bias, eps, plan: MaskPlan, kind):
    total = x + residual
    return total, layer_norm(total, weight, bias, eps, plan, kind)


def add_rms_norm(x, residual, weight, eps, plan: MaskPlan, kind):
    total = x + residual
    return total, rms_norm(total, weight, eps, plan, kind)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, plan, tokens):
        y, mean, rstd = torch.ops.aten.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.plan, ctx.tokens, ctx.eps = plan, tokens, eps
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            dy, x, weight.shape, mean, rstd, weight, bias, [True, False, False]
        )
        # On a CPU torch hands over the statistics of a bf16 input in bf16, too coarse for a sum over all tokens.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normalized = F.layer_norm(wide, weight.shape, eps=ctx.eps)
        dw = token_sum((normalized * dy).flatten(0, 1), ctx.plan, ctx.tokens)
        db = token_sum(dy.flatten(0, 1), ctx.plan, ctx.tokens)
        return dx, dw.to(weight.dtype), db.to(bias.dtype), None, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, plan, tokens):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.plan, ctx.tokens = plan, tokens
        return (wide * rstd * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        normalized = x.to(rstd.dtype) * rstd
        dy = dy.to(rstd.dtype)
        dn = dy * weight
        dx = (dn - normalized * (dn * normalized).mean(-1, keepdim=True)) * rstd
        products = (dy * normalized).flatten(0, 1)
        dw = products.sum(0) if ctx.tokens is None else token_sum(products, ctx.plan, ctx.tokens)
        return dx.to(x.dtype), dw.to(weight.dtype), None, None, None
