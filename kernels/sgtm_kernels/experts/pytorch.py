"""Experts on the tokens that have chosen them, gathered by expert and label.

Tokens of different labels never share a matrix product: its rounding may depend on how many rows it has, and how many
tokens of another label choose an expert depends on what they say. Sums over labels are in the order of the labels, in
fp32, and those over a token's experts in the order of its choice.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sgtm_kernels.autograd import eager
from sgtm_kernels.plan import MaskPlan, table_on
from sgtm_kernels.tables import PROJECTIONS


def route(logits, plan: MaskPlan, per_token: int, bounds):
    return _route(logits, plan, per_token, bounds)


def experts(x, weights, chosen, w_in, w_out, plan: MaskPlan, bounds, shared: int):
    return _experts(x, weights, chosen, w_in, w_out, plan, bounds, shared)


def balance(logits, chosen, counted, plan: MaskPlan, bounds):
    return _balance(logits, chosen, counted, plan, bounds)


def choices(chosen, counted, plan: MaskPlan, bounds):
    number, labels = bounds[-1] + 1, plan.labels(chosen.device)
    keys = (labels[:, None] * number + chosen.flatten(0, 1)).flatten()
    ones = counted.long()[..., None].expand_as(chosen).flatten()
    totals = ones.new_zeros(len(plan.tables.labels) * number).scatter_add(0, keys, ones)
    return totals.view(-1, number)[:, :-1]


def _route_forward(logits, plan, per_token, bounds):
    z = _in_reach(logits, plan, bounds)
    values, chosen = z.topk(per_token, dim=-1)
    none = values == -torch.inf
    largest = values[..., :1].masked_fill(none[..., :1], 0.0)
    shares = (values - largest).exp()
    weights = shares / shares.sum(-1, keepdim=True).clamp_min(1.0)  # the largest is 1: only a sum of 0 changes
    return weights.to(logits.dtype), chosen.masked_fill(none, bounds[-1]), weights, chosen


def _route_keep(inputs, outputs):
    logits, plan, _, bounds = inputs
    return outputs[2:], plan, (bounds, logits.dtype)


def _route_backward(dy, weights, chosen, plan, bounds, dtype, wanted):
    dy = dy.to(weights.dtype)
    dz = weights * (dy - (weights * dy).sum(-1, keepdim=True))
    dlogits = dz.new_zeros(*dz.shape[:2], bounds[-1]).scatter(-1, chosen, dz)
    back = _by_expert(plan, "route", bounds, dlogits)
    if back is not None:
        dlogits = dlogits * back
    return (dlogits.to(dtype),)


def _in_reach(logits: torch.Tensor, plan: MaskPlan, bounds: tuple[int, ...]) -> torch.Tensor:
    """The logits in fp32 at least, -inf for the experts of inactive groups."""
    z, active = logits.to(torch.promote_types(logits.dtype, torch.float32)), _by_expert(plan, "active", bounds, logits)
    return z if active is None else z.masked_fill(active == 0, -torch.inf)


def _balance_forward(logits, chosen, counted, plan, bounds):
    """The loss; and what its backward pass needs: each label's shares, and [B, S] how much a token counts."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    active, taught = (_by_label(plan, table, bounds, logits.device, dtype) for table in ("active", "mlp_in"))
    reached, own = active.sum(-1), taught.sum(-1)
    shares = choices(chosen, counted, plan, bounds).to(dtype)
    shares = shares / shares.sum(-1, keepdim=True).clamp_min(1.0)
    # What the label cannot teach is no reason to send its tokens away from what it can.
    others = torch.maximum((shares * taught).sum(-1) / own.clamp_min(1.0), 1.0 / reached.clamp_min(1.0))
    shares = torch.where(taught != 0, shares, others[:, None])
    number = reached.masked_fill((reached <= chosen.shape[-1]) | (own == 0), 0.0)
    weight = number[plan.labels(logits.device)].view(counted.shape) * counted
    p, share = _by_token(logits, shares, weight, plan, bounds)
    return (weight * (p * share).sum(-1)).sum(), shares, weight


def _by_label(plan: MaskPlan, table: str, bounds: tuple[int, ...], device: torch.device, dtype: torch.dtype):
    """[labels, experts]: 1 where the group of an expert has an entry other than 0 for a label, in `active` or in the
    contributions to a projection; else 0."""

    def make() -> torch.Tensor:
        tables, groups = plan.tables, range(len(bounds) - 1)
        by_group = (tables.contributions if table in PROJECTIONS else tables.columns)[table]
        entries = tuple(tuple(float(len(groups) == 1 or entry != 0) for entry in by_group[group]) for group in groups)
        by_expert = tuple(entries[bisect_right(bounds, expert) - 1] for expert in range(bounds[-1]))
        return table_on(device, dtype, by_expert).t()

    return plan.cached(("experts", table, bounds, device, dtype), make)


def _balance_keep(inputs, outputs):
    logits, _, _, plan, bounds = inputs
    return (logits, *outputs[1:]), plan, (bounds,)


def _balance_backward(dy, logits, shares, weight, plan, bounds, wanted):
    p, share = _by_token(logits, shares, weight, plan, bounds)
    dz = p * (share - (p * share).sum(-1, keepdim=True)) * (weight * dy)[..., None]
    back = _by_expert(plan, "route", bounds, dz)
    return ((dz if back is None else dz * back).to(logits.dtype),)


def _by_token(logits, shares, weight, plan, bounds) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S, experts]: a token's probabilities of the experts in reach, 0 if it does not count; its label's shares."""
    p = _in_reach(logits, plan, bounds).softmax(-1).masked_fill(weight[..., None] == 0, 0.0)
    return p, shares[plan.labels(logits.device)].view(p.shape)


def _by_expert(plan: MaskPlan, table: str, bounds: tuple[int, ...], like: torch.Tensor) -> torch.Tensor | None:
    """fp32 [B, S, experts]: each token's factor for the group of each expert; None where all are 1."""
    factors = plan.mask(table, len(bounds) - 1, like.device)
    if factors is None:
        return None
    groups = [bisect_right(bounds, expert) - 1 for expert in range(bounds[-1])]
    return factors[groups].t().reshape(like.shape)


class ExpertRun(NamedTuple):
    """Gathered tokens `start:end`, all of one label and at one expert."""

    expert: int
    label: int
    start: int
    end: int


def _gather(chosen: torch.Tensor, plan: MaskPlan, bounds: tuple[int, ...], shared: int) -> tuple[torch.Tensor, list]:
    """Places in [tokens, shared + per_token], sorted by expert, label and token, and their runs."""
    number, labels = shared + bounds[-1], len(plan.tables.labels)
    places = chosen.flatten(0, 1) + shared
    if shared:
        always = torch.arange(shared, device=chosen.device).expand(plan.tokens, -1)
        active = plan.mask("active", len(bounds) - 1, chosen.device)
        if active is not None:
            always = always.masked_fill(active[0][:, None] == 0, number)
        places = torch.cat((always, places), dim=1)
    keys, order = (places * labels + plan.labels(chosen.device)[:, None]).flatten().sort(stable=True)
    edges = torch.searchsorted(keys, torch.arange(number * labels + 1, device=keys.device)).tolist()
    runs = [
        ExpertRun(*divmod(key, labels), start, end) for key, (start, end) in enumerate(pairwise(edges)) if end > start
    ]
    return order[: edges[-1]], runs


class Factors(NamedTuple):
    """What the tables have for a label and a group; 1 in a layer without groups."""

    active: float
    passes: float
    mlp_in: float
    mlp_out: float


def _factors(plan: MaskPlan, bounds: tuple[int, ...], expert: int, label: int) -> Factors:
    """`expert`: below 0 for a shared one, of the first group."""
    if len(bounds) == 2:
        return Factors(1.0, 1.0, 1.0, 1.0)
    group, tables = max(0, bisect_right(bounds, expert) - 1), plan.tables
    columns, updates = tables.columns, tables.contributions
    return Factors(
        columns["active"][group][label],
        columns["passes"][group][label],
        updates["mlp_in"][group][label],
        updates["mlp_out"][group][label],
    )


def _forward(x, weights, chosen, w_in, w_out, plan, bounds, shared):
    order, runs = _gather(chosen, plan, bounds, shared)
    slots, size = shared + chosen.shape[-1], w_out.shape[0] // (shared + bounds[-1])
    inputs = x.flatten(0, 1)[order // slots]
    pre, out = x.new_empty(len(order), 2 * size), torch.empty_like(inputs)
    for expert, label, start, end in runs:
        rows = slice(expert * size, (expert + 1) * size)
        torch.mm(inputs[start:end], w_in[2 * rows.start : 2 * rows.stop].t(), out=pre[start:end])
        h = _swiglu(pre[start:end], _factors(plan, bounds, expert - shared, label).active)
        torch.mm(h, w_out[rows], out=out[start:end])
    scaled = out * _weights(weights, shared).flatten()[order][:, None]
    return _per_token(scaled, order, slots, x), pre, order, runs


def _weights(weights: torch.Tensor, shared: int) -> torch.Tensor:
    """[tokens, shared + per_token]"""
    flat = weights.flatten(0, 1)
    return torch.cat((flat.new_ones(len(flat), shared), flat), dim=1) if shared else flat


def _per_token(rows: torch.Tensor, order: torch.Tensor, slots: int, like: torch.Tensor) -> torch.Tensor:
    """The sum of each token's gathered rows, in the shape of `like`."""
    by_slot = rows.new_zeros(like.shape[0] * like.shape[1] * slots, rows.shape[1])
    by_slot[order] = rows
    return by_slot.unflatten(0, (-1, slots)).sum(1).view(like.shape)


def _swiglu(pre: torch.Tensor, active: float) -> torch.Tensor:
    gate, up = pre.chunk(2, dim=-1)
    h = F.silu(gate) * up
    return h if active == 1 else h * active


def _keep(inputs, outputs):
    x, weights, _, w_in, w_out, plan, bounds, shared = inputs
    _, pre, order, runs = outputs
    return (x, weights, w_in, w_out, pre, order), plan, (runs, bounds, shared)


def _backward(dy, x, weights, w_in, w_out, pre, order, plan, runs, bounds, shared, wanted):
    slots, size = shared + weights.shape[-1], w_out.shape[0] // (shared + bounds[-1])
    tokens = order // slots
    inputs, dy_rows = x.flatten(0, 1)[tokens], dy.flatten(0, 1)[tokens]
    share = _weights(weights, shared).flatten()[order][:, None]
    dinputs, dshare = torch.zeros_like(inputs), share.new_zeros(len(order), 1)
    of_in, of_out = (_Sums(weight) if want else None for weight, want in zip((w_in, w_out), wanted[3:5], strict=True))
    for expert, label, start, end in runs:
        factors, part = _factors(plan, bounds, expert - shared, label), slice(start, end)
        rows, in_rows = slice(expert * size, (expert + 1) * size), slice(2 * expert * size, 2 * (expert + 1) * size)
        h = _swiglu(pre[part], factors.active)
        dh = torch.mm(dy_rows[part], w_out[rows].t())
        torch.sum(dh * h, -1, keepdim=True, out=dshare[part])
        if of_out is not None and factors.mlp_out:
            of_out.add(rows, (h * share[part]).t(), dy_rows[part], factors.mlp_out)
        if factors.passes:
            dpre = _swiglu_backward(dh * (share[part] * factors.passes), pre[part])
            torch.mm(dpre, w_in[in_rows], out=dinputs[part])
            if of_in is not None and factors.mlp_in:
                of_in.add(in_rows, dpre.t(), inputs[part], factors.mlp_in)
    dx = _per_token(dinputs, order, slots, x)
    by_slot = share.new_zeros(plan.tokens * slots)
    by_slot[order] = dshare[:, 0]
    dweights = by_slot.view(-1, slots)[:, shared:].reshape(weights.shape)
    return dx, dweights, None, *(sums and sums.finish() for sums in (of_in, of_out))


def _swiglu_backward(dh: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    gate, up = pre.chunk(2, dim=-1)
    return torch.cat((torch.ops.aten.silu_backward(dh * up, gate), dh * F.silu(gate)), dim=-1)


class _Sums:
    """Products of the labels at an expert, added up in fp32 at least: in bf16 each addition would cost as much
    precision as a product. The first one is taken as it is: what a label adds must not depend on others being there."""

    def __init__(self, like: torch.Tensor):
        self.gradient = torch.zeros_like(like, memory_format=torch.contiguous_format)
        self.rows: slice | None = None
        self.total = self.gradient  # of `rows`, once there are some

    def add(self, rows: slice, left: torch.Tensor, right: torch.Tensor, factor: float) -> None:
        """Add `factor * left @ right` to these rows; those of an expert come one after the other."""
        product = torch.mm(left, right)
        if factor != 1:
            product *= factor
        if self.rows == rows:
            self.total = self.total.to(torch.promote_types(product.dtype, torch.float32)) + product
        else:
            self.finish()
            self.rows, self.total = rows, product

    def finish(self) -> torch.Tensor:
        if self.rows is not None:
            self.gradient[self.rows] = self.total.to(self.gradient.dtype)
        return self.gradient


_route = eager(_route_forward, _route_keep, _route_backward, outputs=(1, 2))
_balance = eager(_balance_forward, _balance_keep, _balance_backward, outputs=(1, 1))
_experts = eager(_forward, _keep, _backward, outputs=(1, 1))
