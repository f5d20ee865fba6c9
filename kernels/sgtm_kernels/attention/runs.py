"""Attention on slices: an inactive (label, group) pair is not computed, a stopped one has no backward.

Groups are slices of the head axis and runs of whole sequences slices of the batch axis, each handed to public attention
(public.py); where labels change inside sequences the output is scaled token by token instead.
"""

from __future__ import annotations

from itertools import groupby

import torch

from sgtm_kernels.attention.public import attend
from sgtm_kernels.attention.visible import Visible
from sgtm_kernels.plan import MAX_SLICES, MaskPlan
from sgtm_kernels.scale import products, scale_columns_


def attention(qkv, layout, plan: MaskPlan, scale, window, rotary, overwrite=False, below=True):
    outputs, tables = [], None if rotary is None else _tables(rotary, qkv.dtype, plan)
    learned = plan.contributions("attn_in", len(layout.heads))
    for group, (q, k, v) in enumerate(layout.split(qkv)):
        if not below and all(learned[group][label] == 0 for label in plan.present):
            q, k, v = q.detach(), k.detach(), v.detach()
        if tables is not None:
            q, k = _Rotate.apply(q, *tables), _Rotate.apply(k, *tables)
        if len(layout.heads) == 1:
            outputs.append(attend(q, k, v, scale, Visible(plan, window)))
        elif plan.whole_sequences and len(plan.runs) <= MAX_SLICES:
            outputs.append(_by_sequences(q, k, v, scale, window, plan, group))
        else:
            outputs.append(_by_tokens(q, k, v, scale, window, plan, group))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return out if out.requires_grad else _Stopped.apply(out, qkv)


def _tables(rotary, dtype: torch.dtype, plan: MaskPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [S, head_dim / 2] in this dtype, made once for all layers. Both halves of a head turn alike."""
    half = rotary[0].shape[-1] // 2

    def make():
        return rotary, tuple(table[:, :half].to(dtype).contiguous() for table in rotary)

    return plan.cached(("rotary", id(rotary[0]), dtype), make)[1]  # which holds `rotary`, so its id is not used again


class _Rotate(torch.autograd.Function):
    """`rotate` (op.py) of x [B, heads, S, d], in two passes over each half, and no temporaries."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, dy):
        return _turned(dy, *ctx.saved_tensors, -1), None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    y = torch.empty_like(x)
    (real, imaginary), (y_real, y_imaginary) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    torch.mul(real, cos, out=y_real).addcmul_(imaginary, sin, value=-direction)
    torch.mul(imaginary, cos, out=y_imaginary).addcmul_(real, sin, value=direction)
    return y


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
        every = last - first == plan.batch  # a slice's gradient would be filled with zeros first
        some = (q, k, v) if every else (x[first:last] for x in (q, k, v))
        out = attend(*some, scale, Visible(plan, window, first, last))
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
    out = attend(q, k, v, scale, Visible(plan, window))
    if all(active[run.label] == route[run.label] == 1 for run in plan.runs):
        return out
    return _ScaleTokens.apply(out, plan, active, products(active, route))


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
