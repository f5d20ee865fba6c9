"""The MLP's non-linearity through autograd: detach is `route`, a product is `active`."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from sgtm_kernels.linear.reference import linear_in
from sgtm_kernels.plan import MaskPlan


def gelu(x, plan: MaskPlan, bounds):
    return mask_groups(F.gelu(x, approximate="tanh"), plan, bounds)


def swiglu(x, plan: MaskPlan, bounds):
    groups = x.split([2 * (end - start) for start, end in pairwise(bounds)], dim=-1)
    halves = [group.chunk(2, dim=-1) for group in groups]
    return mask_groups(torch.cat([F.silu(gate) * up for gate, up in halves], dim=-1), plan, bounds)


def linear_gelu(x, weight, bias, plan: MaskPlan, bounds):
    return gelu(linear_in(x, weight, bias, plan, "mlp_in", bounds, overwrite=False), plan, bounds)


def mask_groups(h: torch.Tensor, plan: MaskPlan, bounds: tuple[int, ...]) -> torch.Tensor:
    """Apply `route`, then `active`, to the group columns of h [B, S, columns]."""
    if len(bounds) == 2:
        return h
    sizes = [end - start for start, end in pairwise(bounds)]
    columns = []
    for group, h_g in enumerate(h.split(sizes, dim=-1)):
        active = plan.token_weights(plan.column("active", group), h).view(*h.shape[:2], 1)
        route = plan.token_weights(plan.column("route", group), h).view(*h.shape[:2], 1)
        routed = h_g.detach() + route * (h_g - h_g.detach())
        columns.append(torch.where(active == 0, 0.0, active * routed))
    return torch.cat(columns, dim=-1)
