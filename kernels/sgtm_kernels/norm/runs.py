"""Norms on slices: dX for all tokens, the weight's gradient over the token ranges that may update it.

On a GPU both gradients come from torch's fused kernels, which read their inputs once. On a CPU torch has none for
RMSNorm, so its dX is computed as that of a layer norm with a mean of 0; and torch's gradients of the weight lose digits
in bf16 (3 % of the largest over 1,000 tokens), so they are summed in fp32 here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from sgtm_kernels.plan import MAX_SLICES, MaskPlan, Slice, Updaters


def layer_norm(x, weight, bias, eps, plan: MaskPlan, kind):
    if kind is None or plan.plain(plan.joint(kind)):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return _LayerNorm.apply(x, weight, bias, eps, plan, plan.joint(kind))


def rms_norm(x, weight, eps, plan: MaskPlan, kind):
    tokens = Updaters((), (Slice(0, plan.tokens, 1.0),)) if kind is None else plan.joint(kind)
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
        backward, shape = torch.ops.aten.native_layer_norm_backward, weight.shape
        dx, _, _ = backward(dy, x, shape, mean, rstd, weight, bias, [True, False, False])

        def sums(dy, tokens):
            rows = x.flatten(0, 1)[tokens]
            if x.device.type == "cpu":  # the statistics of a bf16 input are bf16 there, and no use
                wide = rows.to(torch.promote_types(x.dtype, torch.float32))
                return F.layer_norm(wide, shape, eps=ctx.eps).mul_(dy).sum(0), dy.sum(0, dtype=wide.dtype)
            at = [statistic.flatten(0, 1)[tokens] for statistic in (mean, rstd)]
            return backward(dy, rows, shape, *at, weight, bias, [False, True, True])[1:]

        dw, db = _over_tokens(dy.flatten(0, 1), ctx.plan, ctx.tokens, sums, (weight, bias))
        return dx, dw, db, None, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, plan, tokens):
        if _fused(x, weight):
            y, rstd = torch.ops.aten._fused_rms_norm(x, weight.shape, weight, eps)
        else:
            wide = torch.promote_types(x.dtype, torch.float32)
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
            rstd = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
            y = (x * rstd).mul_(weight).to(x.dtype)
        ctx.save_for_backward(x, weight, rstd)
        ctx.plan, ctx.tokens = plan, tokens
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        rows, rstds = x.flatten(0, 1), rstd.flatten(0, 1)
        fused = torch.ops.aten._fused_rms_norm_backward if _fused(x, weight) else None
        if fused and ctx.plan.plain(ctx.tokens):
            return *fused(dy, x, weight.shape, rstd, weight, [True, True]), None, None, None
        if fused:
            dx, _ = fused(dy, x, weight.shape, rstd, weight, [True, False])
        else:
            dx = _rms_norm_dx(dy, x, rstd, weight)

        def sums(dy, tokens):
            if fused:
                return fused(dy, rows[tokens], weight.shape, rstds[tokens], weight, [False, True])[1:]
            return ((rows[tokens] * rstds[tokens]).mul_(dy).sum(0),)

        (dw,) = _over_tokens(dy.flatten(0, 1), ctx.plan, ctx.tokens, sums, (weight,))
        return dx, dw, None, None, None


def _fused(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch has a kernel for RMSNorm and its gradients on this device."""
    key, name = x.device.type.upper(), "aten::_fused_rms_norm_backward"
    return x.dtype == weight.dtype and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def _rms_norm_dx(dy, x, rstd, weight):
    """That of a layer norm with a mean of 0, which takes the mean of dY * weight, times rstd, away."""
    # On a CPU the weight is as wide as the statistics, elsewhere as x.
    scale, mean = weight.to(rstd.dtype if x.device.type == "cpu" else x.dtype), torch.zeros_like(rstd)
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        dy, x, weight.shape, mean, rstd, scale, None, [True, False, False]
    )
    means = torch.mv(dy.reshape(-1, *weight.shape), weight).view(rstd.shape).to(rstd.dtype).div_(x.shape[-1])
    return dx.add_(means.mul_(rstd).to(dx.dtype))


def _over_tokens(
    dy: torch.Tensor,
    plan: MaskPlan,
    tokens: Updaters,
    sums: Callable[[torch.Tensor, slice], tuple[torch.Tensor, ...]],
    like: tuple[torch.Tensor, ...],
) -> list[torch.Tensor]:
    """Sums over the tokens that count, times their weights, in the dtypes of `like`.

    dy [tokens, columns]; `sums` takes rows of dy and the tokens that they are of. Partial sums are added in at least
    fp32.
    """
    if len(tokens.slices) > MAX_SLICES:
        weighted = dy * plan.token_weights(tokens.by_label, dy)[:, None]
        found = sums(weighted, slice(None))
    elif len(tokens.slices) == 1 and tokens.slices[0].weight == 1:
        at = slice(*tokens.slices[0][:2])
        found = sums(dy[at], at)
    else:
        found = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in like]
        for start, end, weight in tokens.slices:
            at = slice(start, end)
            for total, part in zip(found, sums(dy[at], at), strict=True):
                total.add_(part, alpha=weight)
    return [total.to(x.dtype) for total, x in zip(found, like, strict=True)]
