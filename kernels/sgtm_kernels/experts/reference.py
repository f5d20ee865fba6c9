"""Every expert on every token through autograd, with weight 0 where it is not chosen."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from sgtm_kernels.linear.reference import linear_in, linear_out
from sgtm_kernels.mlp.reference import mask_groups
from sgtm_kernels.plan import MaskPlan


def _in_reach(logits, plan: MaskPlan, bounds):
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if len(bounds) == 2:
        return z
    columns = []
    for group, z_g in enumerate(z.split([end - start for start, end in pairwise(bounds)], dim=-1)):
        active = plan.token_weights(plan.column("active", group), z).view(*z.shape[:2], 1)
        back = plan.token_weights(plan.column("route", group), z).view(*z.shape[:2], 1)
        columns.append((z_g.detach() + back * (z_g - z_g.detach())).masked_fill(active == 0, -torch.inf))
    return torch.cat(columns, dim=-1)


def route(logits, plan: MaskPlan, per_token: int, bounds):
    z = _in_reach(logits, plan, bounds)
    values, chosen = z.topk(per_token, dim=-1)
    none = values == -torch.inf
    weights = values.masked_fill(none, torch.finfo(z.dtype).min).softmax(-1).masked_fill(none, 0.0)
    return weights.to(logits.dtype), chosen.masked_fill(none, bounds[-1])


def choices(chosen, counted, plan: MaskPlan, bounds):
    of_all = F.one_hot(chosen, bounds[-1] + 1).sum(-2)[..., :-1]
    labels = plan.labels(chosen.device).view(chosen.shape[:2])
    return torch.stack([of_all[counted & (labels == label)].sum(0) for label in range(len(plan.tables.labels))])


def balance(logits, chosen, counted, plan: MaskPlan, bounds):
    z, labels = _in_reach(logits, plan, bounds), plan.labels(logits.device).view(chosen.shape[:2])
    total = z.flatten()[:0].sum()
    for label in plan.present:
        mine = z[counted & (labels == label)]
        active = _experts_of(plan.tables.columns["active"], label, bounds)
        own = _experts_of(plan.tables.contributions["mlp_in"], label, bounds)
        if len(active) > chosen.shape[-1] and own and len(mine):
            shares = choices(chosen, counted, plan, bounds)[label].to(z.dtype)
            shares = shares / shares.sum()
            others = max(shares[own].mean(), 1 / len(active))
            shares[[expert for expert in active if expert not in own]] = others
            total = total + len(mine) * len(active) * (shares[active] * mine[:, active].softmax(-1).mean(0)).sum()
    return total


def _experts_of(by_group, label: int, bounds) -> list[int]:
    """Those of the groups whose entry for the label is not 0; all in a layer without groups."""
    spans = enumerate(pairwise(bounds))
    return [e for group, span in spans for e in range(*span) if len(bounds) == 2 or by_group[group][label] != 0]


def experts(x, weights, chosen, w_in, w_out, plan: MaskPlan, bounds, shared: int):
    number = shared + bounds[-1]
    size = w_out.shape[0] // number
    neurons = (0, *((shared + bound) * size for bound in bounds[1:]))
    of_all = weights.new_zeros(*x.shape[:2], bounds[-1] + 1).scatter(-1, chosen, weights)[..., :-1]
    of_all = torch.cat((weights.new_ones(*x.shape[:2], shared), of_all), dim=-1)
    pre = linear_in(x, w_in, None, plan, "mlp_in", tuple(2 * n for n in neurons), overwrite=False)
    gate, up = pre.unflatten(-1, (number, 2, size)).unbind(-2)
    h = mask_groups((F.silu(gate) * up).flatten(-2), plan, neurons)
    h = (h.unflatten(-1, (number, size)) * of_all[..., None]).flatten(-2)
    return linear_out(h, w_out, None, plan, "mlp_out", neurons)
