"""Norms on slices: dX for all tokens, the weight's gradient over the token ranges that may update it.

On a GPU both gradients come from torch's fused kernels, which read their inputs once. On a CPU torch has none for
RMSNorm, so its dX is computed as that of a layer norm with a mean of 0; and torch's gradients of the weight lose digits
in bf16 (3 % of the largest over 1,000 tokens), so they are summed in fp32 here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from sgtm_kernels.autograd import eager
from sgtm_kernels.plan import MAX_SLICES, MaskPlan, Slice, Updaters, table_on


def layer_norm(x, weight, bias, eps, plan: MaskPlan, kind):
    if kind is None or plan.plain(plan.joint(kind)):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return _layer_norm(x, weight, bias, plan, eps, plan.joint(kind))


def rms_norm(x, weight, eps, plan: MaskPlan, kind):
    return _rms_norm(x, weight, plan, eps, _tokens(plan, kind))


def add_layer_norm(x, residual, weight, bias, eps, plan: MaskPlan, kind):
    if kind is None or plan.plain(plan.joint(kind)):
        total = x + residual
        return total, F.layer_norm(total, weight.shape, weight, bias, eps)
    return _add_layer_norm(x, residual, weight, bias, plan, eps, plan.joint(kind))


def add_rms_norm(x, residual, weight, eps, plan: MaskPlan, kind):
    return _add_rms_norm(x, residual, weight, plan, eps, _tokens(plan, kind))


def _tokens(plan: MaskPlan, kind: str | None) -> Updaters:
    if kind is not None:
        return plan.joint(kind)
    return plan.cached("all tokens", lambda: Updaters((), (Slice(0, plan.tokens, 1.0),)))


def _layer_norm_forward(x, weight, bias, plan, eps, tokens):
    return torch.native_layer_norm(x, weight.shape, weight, bias, eps)


def _layer_norm_keep(inputs, outputs):
    x, weight, bias, plan, *numbers = inputs
    return (x, weight, bias, *outputs[1:]), plan, numbers


def _layer_norm_backward(dy, x, weight, bias, mean, rstd, plan, eps, tokens, wanted):
    backward, shape = torch.ops.aten.native_layer_norm_backward.default, weight.shape
    dx = dw = db = None
    if wanted[0]:
        dx, _, _ = backward(dy, x, shape, mean, rstd, weight, bias, [True, False, False])
    if wanted[1] or wanted[2]:
        flat = x.flatten(0, 1)
        narrow = x.dtype not in (torch.float32, torch.float64)

        def sums(dy, tokens):
            rows = flat[tokens]
            if narrow and x.device.type == "cpu":  # where the statistics of a bf16 input are bf16, and no use
                wide = rows.float()
                return F.layer_norm(wide, shape, eps=eps).mul_(dy).sum(0), dy.sum(0, dtype=wide.dtype)
            statistics = mean.flatten(0, 1)[tokens], rstd.flatten(0, 1)[tokens]
            return backward(dy, rows, shape, *statistics, weight, bias, [False, True, True])[1:]

        dw, db = _over_tokens(dy.flatten(0, 1), plan, tokens, sums, (weight, bias))
    return dx, dw, db


def _rms_norm_forward(x, weight, plan, eps, tokens):
    if _fused(x, weight):
        return torch.ops.aten._fused_rms_norm.default(x, weight.shape, weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    rstd = torch.addcmul(table_on(x.device, wide, ((eps,),)), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (x * rstd).mul_(weight).to(x.dtype), rstd


def _rms_norm_keep(inputs, outputs):
    x, weight, plan, _, tokens = inputs
    return (x, weight, outputs[1]), plan, (tokens,)


def _rms_norm_backward(dy, x, weight, rstd, plan, tokens, wanted):
    fused = torch.ops.aten._fused_rms_norm_backward.default if _fused(x, weight) else None
    if fused and plan.plain(tokens):
        return fused(dy, x, weight.shape, rstd, weight, list(wanted[:2]))
    dx = dw = None
    if wanted[0]:
        dx = fused(dy, x, weight.shape, rstd, weight, [True, False])[0] if fused else _rms_norm_dx(dy, x, rstd, weight)
    if wanted[1]:
        rows, rstds = x.flatten(0, 1), rstd.flatten(0, 1)

        def sums(dy, tokens):
            if fused:
                return fused(dy, rows[tokens], weight.shape, rstds[tokens], weight, [False, True])[1:]
            return ((rows[tokens] * rstds[tokens]).mul_(dy).sum(0),)

        (dw,) = _over_tokens(dy.flatten(0, 1), plan, tokens, sums, (weight,))
    return dx, dw


def _added(forward: Callable, keep: Callable, backward: Callable) -> Callable:
    """The op of a norm, of the sum of x and a residual, which it returns too. As one node, the gradient that arrives at
    the sum is added to dX where that is."""

    def of_sum(x, residual, *inputs):
        total = x + residual
        return total, *forward(total, *inputs)

    def keep_sum(inputs, outputs):
        return keep((outputs[0], *inputs[2:]), outputs[1:])

    def gradients(dtotal, dy, *inputs):
        *saved, wanted = inputs
        dx, *learned = backward(dy, *saved, (wanted[0] or wanted[1], *wanted[2:]))
        if dx is not None:
            dx.add_(dtotal)
        return dx, dx, *learned

    return eager(of_sum, keep_sum, gradients, (2, 2))


_layer_norm = eager(_layer_norm_forward, _layer_norm_keep, _layer_norm_backward)
_add_layer_norm = _added(_layer_norm_forward, _layer_norm_keep, _layer_norm_backward)
_rms_norm = eager(_rms_norm_forward, _rms_norm_keep, _rms_norm_backward)
_add_rms_norm = _added(_rms_norm_forward, _rms_norm_keep, _rms_norm_backward)


def _fused(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch has a kernel for RMSNorm and its gradients on this device."""
    key, name = x.device.type.upper(), "aten::_fused_rms_norm_backward"
    return x.dtype == weight.dtype and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def _rms_norm_dx(dy, x, rstd, weight):
    """That of a layer norm with a mean of 0, which takes the mean of dY * weight, times rstd, away."""
    # On a CPU the weight is as wide as the statistics, elsewhere as x.
    scale, mean = weight.to(rstd.dtype if x.device.type == "cpu" else x.dtype), torch.zeros_like(rstd)
    dx, _, _ = torch.ops.aten.native_layer_norm_backward.default(
        dy, x, weight.shape, mean, rstd, scale, None, [True, False, False]
    )
    sums = torch.mv(dy.reshape(-1, *weight.shape), weight).view(rstd.shape)
    return dx.add_((sums * rstd).to(dx.dtype), alpha=1 / x.shape[-1])


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
    totals: Sequence[torch.Tensor]
    if len(tokens.slices) > MAX_SLICES:
        weighted = dy * plan.token_weights(tokens.by_label, dy)[:, None]
        totals = sums(weighted, slice(None))
    elif len(tokens.slices) == 1 and tokens.slices[0].weight == 1:
        span = slice(*tokens.slices[0][:2])
        totals = sums(dy[span], span)
    else:
        totals = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in like]
        for start, end, weight in tokens.slices:
            span = slice(start, end)
            for total, part in zip(totals, sums(dy[span], span), strict=True):
                total.add_(part, alpha=weight)
    return [total.to(x.dtype) for total, x in zip(totals, like, strict=True)]
