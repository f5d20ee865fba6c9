"""LM head and cross-entropy chunk by chunk; gradients are computed in the forward pass, while the logits are at hand.

The loss is linear in `scale`, so the backward pass only multiplies by the incoming gradient. The head's gradient is
accumulated in fp32 over the chunks; a chunk whose tokens may not update the head skips that matmul.
"""

from __future__ import annotations

import torch

from sgtm_kernels.cross_entropy.reference import label_sums
from sgtm_kernels.plan import MaskPlan, Slice, Updaters

IGNORE = -100
# Tokens of a chunk: logits of 1024 x 50257 in bf16 are 100 MB. Softmax goes over ROWS tokens at a time in fp32 (13 MB).
CHUNK = 1024
ROWS = 64


def linear_cross_entropy(x, weight, bias, targets, plan: MaskPlan, scale):
    loss, losses = _LinearCrossEntropy.apply(x, weight, bias, targets, plan, scale)
    return loss, label_sums(losses, plan)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, targets, plan, scale):
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        wide = torch.promote_types(x.dtype, torch.float32)
        flat, targets = x.flatten(0, 1), targets.flatten()
        losses = torch.empty(plan.tokens, dtype=wide, device=x.device)
        dx = torch.empty_like(flat) if need_x else None
        dw = torch.zeros(weight.shape, dtype=wide, device=x.device) if need_w else None
        db = torch.zeros(weight.shape[0], dtype=wide, device=x.device) if need_b else None
        for start in range(0, plan.tokens, CHUNK):
            end = min(start + CHUNK, plan.tokens)
            logits = torch.nn.functional.linear(flat[start:end], weight, bias)
            losses[start:end] = _softmax_gradient_(logits, targets[start:end], need_x or need_w or need_b)
            if need_x:
                torch.mm(logits, weight, out=dx[start:end])
            if need_w:
                for s, e, factor in _clipped(plan.joint("head"), start, end):
                    dw.add_(logits[s - start : e - start].t() @ flat[s:e], alpha=factor)
            if need_b:
                for s, e, factor in _clipped(plan.joint("head_bias"), start, end):
                    db.add_(logits[s - start : e - start].sum(0, dtype=wide), alpha=factor)
        gradients = [
            None if d is None else d.mul_(scale).to(like.dtype) for d, like in ((dx, x), (dw, weight), (db, bias))
        ]
        if need_x:
            gradients[0] = gradients[0].view_as(x)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(losses)
        return losses.sum() * scale, losses

    @staticmethod
    def backward(ctx, dloss, _):
        return (*(None if g is None else g * dloss.to(g.dtype) for g in ctx.saved_tensors), None, None, None)


def _softmax_gradient_(logits: torch.Tensor, targets: torch.Tensor, gradient: bool) -> torch.Tensor:
    """Token losses [n]; overwrites logits [n, V] with the gradient of their sum, softmax - one_hot (0 where ignored)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.empty(len(targets), dtype=wide, device=logits.device)
    ignored = targets == IGNORE
    index = targets.masked_fill(ignored, 0)[:, None]
    for start in range(0, len(targets), ROWS):
        rows = slice(start, start + ROWS)
        log_p = torch.log_softmax(logits[rows], dim=-1, dtype=wide)
        losses[rows] = log_p.gather(1, index[rows]).squeeze(1).neg()
        if gradient:
            p = log_p.exp_()
            p.scatter_add_(1, index[rows], torch.full_like(index[rows], -1, dtype=wide))
            logits[rows] = p
    if gradient:
        logits.masked_fill_(ignored[:, None], 0)
    return losses.masked_fill_(ignored, 0)


def _clipped(tokens: Updaters, start: int, end: int) -> list[Slice]:
    """The slices within `start:end`."""
    inside = [Slice(max(s, start), min(e, end), weight) for s, e, weight in tokens.slices]
    return [piece for piece in inside if piece.start < piece.end]
