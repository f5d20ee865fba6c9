"""Attention on slices: an inactive (label, group) pair is not computed, a stopped one has no backward.

Groups are slices of the head axis and runs of whole sequences slices of the batch axis, each handed to
`scaled_dot_product_attention` (on a CPU to blocks.py, where that pays); where labels change inside sequences the output
is scaled token by token instead.
"""

from __future__ import annotations

from functools import lru_cache, partial
from itertools import groupby

import torch
import torch.nn.functional as F

from sgtm_kernels.attention import blocks
from sgtm_kernels.attention.op import rotate
from sgtm_kernels.plan import MAX_SLICES, MaskPlan
from sgtm_kernels.scale import products, scale_columns_


def attention(qkv, layout, plan: MaskPlan, scale, window, rotary):
    outputs = []
    for group, (q, k, v) in enumerate(layout.split(qkv)):
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if len(layout.heads) == 1:
            outputs.append(_attend(q, k, v, scale, window, plan.documents))
        elif plan.whole_sequences and len(plan.runs) <= MAX_SLICES:
            outputs.append(_by_sequences(q, k, v, scale, window, plan, group))
        else:
            outputs.append(_by_tokens(q, k, v, scale, window, plan, group))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return out if out.requires_grad else _Stopped.apply(out, qkv)


def _by_sequences(q, k, v, scale, window, plan: MaskPlan, group: int) -> torch.Tensor:
    """[B, S, heads * head_dim] of one group; runs are ranges of sequences."""
    active, route = plan.column("active", group), plan.column("route", group)
    parts = []
    for (on, passes), runs in groupby(plan.runs, key=lambda run: (active[run.label], route[run.label])):
        runs = list(runs)
        first, last = runs[0].start // plan.seq_len, runs[-1].end // plan.seq_len
        if on == 0:
            parts.append(q.new_zeros(last - first, plan.seq_len, q.shape[1] * q.shape[3]))
            continue
        documents = _within(plan.documents, first * plan.seq_len, last * plan.seq_len)
        out = _attend(*(x[first:last] for x in (q, k, v)), scale, window, documents)
        if passes == 0:
            out = out.detach() * on
        elif (on, passes) != (1, 1):
            out = _Scale.apply(out, on, on * passes)
        parts.append(out)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _by_tokens(q, k, v, scale, window, plan: MaskPlan, group: int) -> torch.Tensor:
    """The same where labels change inside sequences."""
    active, route = plan.column("active", group), plan.column("route", group)
    if all(active[run.label] == 0 for run in plan.runs):
        return q.new_zeros(plan.batch, plan.seq_len, q.shape[1] * q.shape[3])
    out = _attend(q, k, v, scale, window, plan.documents)
    if all(active[run.label] == route[run.label] == 1 for run in plan.runs):
        return out
    return _ScaleTokens.apply(out, plan, active, products(active, route))


def _within(documents, start: int, end: int):
    """The documents of these tokens, shifted to begin at 0."""
    if documents is None:
        return None
    return tuple((s - start, e - start) for s, e in documents if start <= s < end)


def _attend(q, k, v, scale: float, window: int | None, documents) -> torch.Tensor:
    """q [B, heads, S, d], k and v [B, kv_heads, S, d] -> [B, S, heads * d]."""
    seq_len = q.shape[2]
    if documents is None:
        return _causal(q, k, v, scale, window)
    parts = []
    for start, end in documents:
        row, s = divmod(start, seq_len)
        at = (slice(row, row + 1), slice(None), slice(s, s + end - start))
        parts.append(_causal(q[at], k[at], v[at], scale, window)[0])
    return torch.cat(parts).view(q.shape[0], seq_len, -1)


def _causal(q, k, v, scale: float, window: int | None) -> torch.Tensor:
    """Causal attention of every sequence, [B, S, heads * d]."""
    if blocks.pays(q):
        return blocks.attend(q, k, v, scale, window)
    sdpa = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    if window is None or window >= q.shape[2]:
        return sdpa(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    # A block of `window` queries sees keys of its own block and of the one before: a band of the square.
    q, k, v = (x.split(window, dim=2) for x in (q, k, v))
    parts = [sdpa(q[0], k[0], v[0], is_causal=True)]
    for i in range(1, len(q)):
        keys, values = torch.cat(k[i - 1 : i + 1], dim=2), torch.cat(v[i - 1 : i + 1], dim=2)
        parts.append(sdpa(q[i], keys, values, attn_mask=_band(q[i].shape[2], window, q[i].dtype, q[i].device)))
    return torch.cat(parts, dim=2).transpose(1, 2).flatten(2)


@lru_cache(maxsize=32)
def _band(queries: int, window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[queries, window + queries] additive mask: query t is key window + t and sees the `window` keys up to itself."""
    position = torch.arange(window + queries, device=device)
    distance = position[window:, None] - position
    return torch.zeros(distance.shape, dtype=dtype, device=device).masked_fill_(
        (distance < 0) | (distance >= window), -torch.inf
    )


class _Scale(torch.autograd.Function):
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
