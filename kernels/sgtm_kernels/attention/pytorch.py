"""Attention on slices: an inactive (label, group) pair is not computed, a stopped one has no backward.

Groups are slices of the head axis and runs of whole sequences slices of the batch axis, each handed to public attention
(public.py); where labels change inside sequences the output is scaled token by token instead.
"""

from __future__ import annotations

from itertools import groupby

import torch

from sgtm_kernels.attention.blocks import pays
from sgtm_kernels.attention.heads import cut, heads
from sgtm_kernels.attention.public import attend
from sgtm_kernels.attention.visible import Visible
from sgtm_kernels.plan import MAX_SLICES, MaskPlan
from sgtm_kernels.scale import products, scale_columns_


def attention(qkv, layout, plan: MaskPlan, scale, window, rotary, overwrite=False, below=True):
    key = ("cut", layout, rotary is None, below, qkv.dtype, qkv.device)
    pieces_of, together = plan.cached(key, lambda: _cut(qkv, layout, plan, rotary is not None, below))
    cos, sin = (None, None) if rotary is None else _tables(rotary, qkv.dtype, plan)
    pieces = heads(qkv, cos, sin, plan, pieces_of)
    if together:
        q, k, v = pieces
        out = attend(q, k, v, scale, Visible(plan, window))
    else:
        masked = _by_sequences if plan.whole_sequences and len(plan.label_runs) <= MAX_SLICES else _by_tokens
        groups, learned = pieces_of.by_group(pieces), plan.contributions("attn_in", len(layout.heads))
        if not below:  # no gradient for heads whose projection learns nothing either
            stopped = [all(by_label[label] == 0 for label in plan.present) for by_label in learned]
            groups = [
                (q.detach(), k.detach(), v.detach()) if stop else (q, k, v)
                for stop, (q, k, v) in zip(stopped, groups, strict=True)
            ]
        out = torch.cat([masked(q, k, v, scale, window, plan, i) for i, (q, k, v) in enumerate(groups)], dim=-1)
    return out if out.requires_grad or not qkv.requires_grad else _Stopped.apply(out, qkv)


def _cut(qkv, layout, plan: MaskPlan, turned: bool, below: bool):
    """How the projection is cut; and whether the groups are attended to in one call: their outputs are not masked, as
    those of a single group never are, and their KV heads have as many query heads. On a CPU not where blocks.py takes a
    copy of them anyway, and where its bits could depend on how many heads there are."""
    one, (all_q, all_kv) = len(layout.heads) == 1, map(sum, (layout.heads, layout.kv_heads))
    shares = [q * all_kv == kv * all_q for q, kv in zip(layout.heads, layout.kv_heads, strict=True)]
    plain = below and all(shares) and not plan.signature.outputs
    together = one or (plain and not pays(qkv, layout.head_dim))
    return cut(layout, together, turned, qkv.device), together


def _tables(rotary, dtype: torch.dtype, plan: MaskPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """cos [S, 1, head_dim] and sin [S, 1, head_dim / 2] in this dtype, made once for all layers. Both halves of a head
    turn alike."""

    def make():
        cos, sin = (table.to(dtype)[:, None] for table in rotary)
        return rotary, (cos.contiguous(), sin[..., : sin.shape[-1] // 2].contiguous())

    return plan.cached(("rotary", id(rotary[0]), dtype), make)[1]  # which holds `rotary`, so its id is not used again


def _by_sequences(q, k, v, scale, window, plan: MaskPlan, group: int) -> torch.Tensor:
    """[B, S, heads * head_dim] of one group; runs are ranges of sequences."""
    active, route = plan.column("active", group), plan.column("route", group)
    parts = []
    for (on, passes), alike in groupby(plan.label_runs, key=lambda run: (active[run.label], route[run.label])):
        runs = list(alike)
        first, last = runs[0].start // plan.seq_len, runs[-1].end // plan.seq_len
        if on == 0:
            parts.append(q.new_zeros(last - first, plan.seq_len, q.shape[1] * q.shape[3]))
            continue
        every = last - first == plan.batch  # a slice's gradient would be filled with zeros first
        q_some, k_some, v_some = (q, k, v) if every else (x[first:last] for x in (q, k, v))
        out = attend(q_some, k_some, v_some, scale, Visible(plan, window, first, last))
        if passes == 0:
            out = out.detach() * on
        elif (on, passes) != (1, 1):
            out = _ScaleGroup.apply(out, on, on * passes)
        parts.append(out)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _by_tokens(q, k, v, scale, window, plan: MaskPlan, group: int) -> torch.Tensor:
    """The same where labels change inside sequences."""
    active, route = plan.column("active", group), plan.column("route", group)
    if all(active[run.label] == 0 for run in plan.label_runs):
        return q.new_zeros(plan.batch, plan.seq_len, q.shape[1] * q.shape[3])
    out = attend(q, k, v, scale, Visible(plan, window))
    if all(active[run.label] == route[run.label] == 1 for run in plan.label_runs):
        return out
    return _ScaleTokens.apply(out, plan, active, products(active, route))


class _ScaleGroup(torch.autograd.Function):
    """x * forward_factor, whose gradient is scaled by `backward_factor`."""

    @staticmethod
    def forward(ctx, x, forward_factor, backward_factor):
        ctx.factor = backward_factor
        return x * forward_factor

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.factor, None, None


class _Stopped(torch.autograd.Function):
    """`out`, with a gradient of 0 for `qkv` and not none at all: ranks that differ in that wait for one another."""

    @staticmethod
    def forward(ctx, out, qkv):
        ctx.shape = qkv.shape
        return out.view_as(out)

    @staticmethod
    def backward(ctx, dy):
        return None, dy.new_zeros(ctx.shape)


class _ScaleTokens(torch.autograd.Function):
    """The same with a factor for each label; x [B, S, columns]."""

    @staticmethod
    def forward(ctx, x, plan, forward_by_label, backward_by_label):
        ctx.plan, ctx.by_label = plan, backward_by_label
        return _scaled(x, plan, forward_by_label)

    @staticmethod
    def backward(ctx, dy):
        return _scaled(dy, ctx.plan, ctx.by_label), None, None, None


def _scaled(x: torch.Tensor, plan: MaskPlan, by_label: tuple[float, ...]) -> torch.Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    scale_columns_(y.view(plan.tokens, -1), plan, 0, y.shape[-1], by_label)
    return y
