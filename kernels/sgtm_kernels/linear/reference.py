"""Masked linear layers through autograd.

The value is computed with detached weights, which leaves the plain dX; then a term that is exactly 0 in the forward
pass, `u * (z - z.detach())`, carries each token's weight gradient multiplied by `u`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from sgtm_kernels.plan import MaskPlan


def update_only(z: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Exactly 0, with the gradient of `z` multiplied by `weights` [tokens]; z [B, S, columns]."""
    return weights.view(*z.shape[:2], 1) * (z - z.detach())


def linear_in(x, weight, bias, plan: MaskPlan, projection: str, bounds, overwrite: bool):
    if len(bounds) == 2:
        return F.linear(x, weight, bias)
    columns = []
    for group, (start, end) in enumerate(pairwise(bounds)):
        b = None if bias is None else bias[start:end]
        z = F.linear(x.detach(), weight[start:end], b)
        columns.append(update_only(z, plan.token_weights(_contributions(plan, projection, group), x)))
    value = F.linear(x, weight.detach(), None if bias is None else bias.detach())
    return value + torch.cat(columns, dim=-1)


def linear_out(x, weight, bias, plan: MaskPlan, projection: str, bounds):
    if len(bounds) == 2:
        return F.linear(x, weight.t(), bias)
    y = F.linear(x, weight.detach().t(), None if bias is None else bias.detach())
    for group, (start, end) in enumerate(pairwise(bounds)):
        z = F.linear(x[..., start:end].detach(), weight[start:end].t())
        y = y + update_only(z, plan.token_weights(_contributions(plan, projection, group), x))
    if bias is not None:
        z = bias.expand_as(y)
        y = y + update_only(z, plan.token_weights(plan.tables.update_joint[f"{projection}_bias"], x))
    return y


def _contributions(plan: MaskPlan, projection: str, group: int) -> tuple[float, ...]:
    return tuple(plan.tables.contribution(projection, label, group) for label in range(len(plan.tables.labels)))
