"""The MLP's non-linearity in a compiled graph: plain torch, with a factor per token that the compiler fuses."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from sgtm_kernels.graph import scale_groups
from sgtm_kernels.linear.compiled import linear_in
from sgtm_kernels.plan import MaskPlan
from sgtm_kernels.signature import masked


def gelu(x, plan: MaskPlan, bounds):
    h = F.gelu(x, approximate="tanh")
    if len(bounds) == 2 or not masked(plan, "outputs"):
        return h
    return torch.cat(scale_groups(h.split(_sizes(bounds), dim=-1), plan, x), dim=-1)


def swiglu(x, plan: MaskPlan, bounds):
    halves = (group.chunk(2, dim=-1) for group in x.split([2 * size for size in _sizes(bounds)], dim=-1))
    groups = [F.silu(gate) * up for gate, up in halves]
    if len(groups) > 1 and masked(plan, "outputs"):
        groups = scale_groups(groups, plan, x)
    return torch.cat(groups, dim=-1)


def linear_gelu(x, weight, bias, plan: MaskPlan, bounds):
    return gelu(linear_in(x, weight, bias, plan, "mlp_in", bounds), plan, bounds)


def _sizes(bounds: tuple[int, ...]) -> list[int]:
    return [end - start for start, end in pairwise(bounds)]
