"""Masked linear layers on slices: masks become row and token ranges of plain matmuls.

With one domain and sorted runs, the tokens that may update the retain rows are one contiguous range, and so are those
that may update the forget rows: two matmuls that together do less work than the unmasked one. Where nothing is
masked, it is one plain matmul.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sgtm_kernels.autograd import eager
from sgtm_kernels.plan import MAX_SLICES, MaskPlan, RowWork, Updaters

BIAS_KIND = {projection: f"{projection}_bias" for projection in ("attn_out", "mlp_out")}


def linear_in(x, weight, bias, plan: MaskPlan, projection: str, bounds, overwrite: bool):
    if len(bounds) == 2:
        return F.linear(x, weight, bias)
    return _linear_in(x, weight, bias, plan, plan.rows(projection, bounds))


def linear_out(x, weight, bias, plan: MaskPlan, projection: str, bounds):
    if len(bounds) == 2:
        return F.linear(x, weight.t(), bias)
    return _linear_out(x, weight, bias, plan, plan.rows(projection, bounds), plan.joint(BIAS_KIND[projection]))


def _in_forward(x, weight, bias, plan, work):
    return F.linear(x, weight, bias)


def _out_forward(x, weight, bias, plan, work, bias_tokens):
    return F.linear(x, weight.t(), bias)


def _keep(inputs, output):
    x, weight, _, plan, *numbers = inputs
    return (x, weight), plan, numbers


def in_backward(dy, x, weight, plan, work, wanted):
    x2, dy2 = x.flatten(0, 1), dy.flatten(0, 1)
    dx = torch.mm(dy2, weight).view(x.shape) if wanted[0] else None
    dw = weight_gradient(dy2, x2, plan, work) if wanted[1] else None
    db = _rows_sum(dy2, plan, work) if wanted[2] else None
    return dx, dw, db


def _out_backward(dy, x, weight, plan, work, bias_tokens, wanted):
    x2, dy2 = x.flatten(0, 1), dy.flatten(0, 1)
    dx = torch.mm(dy2, weight.t()).view(x.shape) if wanted[0] else None
    dw = weight_gradient(x2, dy2, plan, work) if wanted[1] else None
    db = token_sum(dy2, plan, bias_tokens) if wanted[2] else None
    return dx, dw, db


_linear_in = eager(_in_forward, _keep, in_backward)
_linear_out = eager(_out_forward, _keep, _out_backward)


def _rows_sum(dy: torch.Tensor, plan: MaskPlan, work: tuple[RowWork, ...]) -> torch.Tensor:
    """The bias's gradient: dy [tokens, rows] -> [rows]."""
    if len(work) == 1:
        return token_sum(dy, plan, work[0].tokens)
    return torch.cat([token_sum(dy[:, start:end], plan, tokens) for start, end, tokens in work])


def weight_gradient(left: torch.Tensor, right: torch.Tensor, plan: MaskPlan, work: tuple[RowWork, ...]) -> torch.Tensor:
    """Masked `left^T @ right`: left [tokens, rows], right [tokens, columns] -> [rows, columns].

    A row range is the sum over its tokens times their weights; rows that no token may update are exactly 0.
    """
    if len(work) == 1 and plan.plain(work[0].tokens):
        return torch.mm(left.t(), right)
    columns, out = left.t(), left.new_empty(left.shape[1], right.shape[1])
    for start, end, (by_label, slices) in work:
        rows = out[start:end]
        if not slices:
            rows.zero_()
        elif len(slices) > MAX_SLICES:
            weights = plan.token_weights(by_label, left)[:, None]
            if end - start <= right.shape[1]:
                torch.mm((left[:, start:end] * weights).t(), right, out=rows)
            else:
                torch.mm(columns[start:end], right * weights, out=rows)
        elif len(slices) == 1 and slices[0].weight == 1:
            s, e, _ = slices[0]
            if e - s == plan.tokens:
                torch.mm(columns[start:end], right, out=rows)
            else:
                torch.mm(columns[start:end, s:e], right[s:e], out=rows)
        else:
            # Partial sums are added in fp32: in bf16 each addition would cost as much precision as the matmul itself.
            total = torch.zeros(rows.shape, dtype=torch.promote_types(out.dtype, torch.float32), device=out.device)
            for s, e, weight in slices:
                total.add_(torch.mm(columns[start:end, s:e], right[s:e]), alpha=weight)
            rows.copy_(total)
    return out


def token_sum(x: torch.Tensor, plan: MaskPlan, tokens: Updaters) -> torch.Tensor:
    """Masked `x.sum(0)`: x [tokens, columns] -> [columns]; partial sums are added in at least fp32."""
    if plan.plain(tokens):
        return x.sum(0)
    if len(tokens.slices) > MAX_SLICES:
        return plan.token_weights(tokens.by_label, x) @ x  # 5 times as fast on a CPU as scaling and summing
    if len(tokens.slices) == 1 and tokens.slices[0].weight == 1:
        start, end, _ = tokens.slices[0]
        return x[start:end].sum(0)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(x.shape[1], dtype=accumulate, device=x.device)
    for start, end, weight in tokens.slices:
        total.add_(x[start:end].sum(0, dtype=accumulate), alpha=weight)
    return total.to(x.dtype)
