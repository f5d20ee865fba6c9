"""Norms through autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sgtm_kernels.linear.reference import update_only
from sgtm_kernels.plan import MaskPlan


def layer_norm(x, weight, bias, eps, plan: MaskPlan, kind):
    if kind is None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    y = F.layer_norm(x, weight.shape, weight.detach(), bias.detach(), eps)
    learned = F.layer_norm(x.detach(), weight.shape, weight, bias, eps)
    return y + update_only(learned, plan.token_weights(plan.tables.update_joint[kind], x))


def rms_norm(x, weight, eps, plan: MaskPlan, kind):
    if kind is None:
        return _rms_norm(x, weight, eps)
    learned = _rms_norm(x.detach(), weight, eps)
    return _rms_norm(x, weight.detach(), eps) + update_only(
        learned, plan.token_weights(plan.tables.update_joint[kind], x)
    )


def add_layer_norm(x, residual, weight, bias, eps, plan: MaskPlan, kind):
    total = x + residual
    return total, layer_norm(total, weight, bias, eps, plan, kind)


def add_rms_norm(x, residual, weight, eps, plan: MaskPlan, kind):
    total = x + residual
    return total, rms_norm(total, weight, eps, plan, kind)


def _rms_norm(x, weight, eps):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)
