"""LM head and cross-entropy chunk by chunk; gradients are computed in the forward pass, while the logits are at hand.

The loss is linear in `scale`, so the backward pass only multiplies by the incoming gradient. A chunk whose tokens may
not update the head skips that matmul; where a single slice of tokens updates it, its gradient is that matmul's
result, else the partial results are added in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sgtm_kernels.cross_entropy.reference import label_sums
from sgtm_kernels.plan import MaskPlan, Slice, Updaters

IGNORE = -100
# A chunk's logits take at most this much, in the dtype of the model: 2,668 tokens of 50,257 logits in bf16.
CHUNK_BYTES = 2**28
# Tokens whose softmax is in flight in fp32 at a time. On a CPU 13 MB of 50,257 logits, which stay in the cache; on a
# GPU more, as every block costs nine launches.
ROWS, GPU_ROWS = 64, 1024


def linear_cross_entropy(x, weight, bias, targets, plan: MaskPlan, scale):
    loss, losses = _LinearCrossEntropy.apply(x, weight, bias, targets, plan, scale, torch.is_grad_enabled())
    return loss, label_sums(losses, plan)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, targets, plan, scale, training):
        need_x, need_w, need_b = (needed and training for needed in ctx.needs_input_grad[:3])
        flat, targets = x.flatten(0, 1), targets.flatten()
        wide = torch.promote_types(x.dtype, torch.float32)
        losses = torch.empty(plan.tokens, dtype=wide, device=x.device)
        dx = torch.empty_like(flat) if need_x else None
        dw, db = _Sum(weight), _Sum(bias)
        chunk = max(ROWS, CHUNK_BYTES // (weight.shape[0] * weight.element_size()))
        for start in range(0, plan.tokens, chunk):
            end = min(start + chunk, plan.tokens)
            logits = F.linear(flat[start:end], weight, bias)
            losses[start:end] = _softmax_gradient_(logits, targets[start:end], need_x or need_w or need_b)
            if need_x:
                torch.mm(logits, weight, out=dx[start:end])
            if need_w:
                for s, e, factor in _clipped(plan.joint("head"), start, end):
                    dw.add(logits[s - start : e - start].t() @ flat[s:e], factor)
            if need_b:
                for s, e, factor in _clipped(plan.joint("head_bias"), start, end):
                    db.add(logits[s - start : e - start].sum(0), factor)
        ctx.scale = scale
        ctx.save_for_backward(
            dx.view_as(x) if need_x else None, dw.total() if need_w else None, db.total() if need_b else None
        )
        ctx.mark_non_differentiable(losses)
        return losses.sum() * scale, losses

    @staticmethod
    def backward(ctx, dloss, _):
        factor = dloss * ctx.scale
        return (*(None if g is None else g * factor for g in ctx.saved_tensors), None, None, None, None)


class _Sum:
    """Gradient of a parameter, from partial results in its dtype."""

    def __init__(self, like: torch.Tensor | None):
        self.like, self.value = like, None

    def add(self, partial: torch.Tensor, factor: float) -> None:
        if self.value is None:
            self.value = partial if factor == 1 else partial.mul_(factor)
        else:
            wide = torch.promote_types(partial.dtype, torch.float32)
            self.value = self.value.to(wide).add_(partial, alpha=factor)

    def total(self) -> torch.Tensor:
        return torch.zeros_like(self.like) if self.value is None else self.value.to(self.like.dtype)


def _softmax_gradient_(logits: torch.Tensor, targets: torch.Tensor, gradient: bool) -> torch.Tensor:
    """Token losses [n]; overwrites logits [n, V] with the gradient of their sum, softmax - one_hot (0: no target)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    ignored = targets == IGNORE
    index = targets.masked_fill(ignored, 0)[:, None]
    losses = torch.empty(len(targets), dtype=wide, device=logits.device)
    block = min(GPU_ROWS if logits.is_cuda else ROWS, len(targets))
    z_buffer, p_buffer = torch.empty(2, block, logits.shape[1], dtype=wide, device=logits.device)
    for start in range(0, len(targets), block):
        rows = slice(start, start + block)
        n = len(index[rows])
        z, p = z_buffer[:n].copy_(logits[rows]), p_buffer[:n]
        torch.softmax(z, dim=-1, out=p)
        # log(max p) is -log(sum(exp(z - max z))): the sum's logarithm without exponentials of its own.
        below_max = z.amax(-1) - z.gather(1, index[rows]).squeeze(1)
        losses[rows] = below_max - p.amax(-1).log_()
        if gradient:
            logits[rows] = p.scatter_add_(1, index[rows], torch.full_like(index[rows], -1, dtype=wide))
    if gradient and (logits.is_cuda or ignored.any()):  # to ask a GPU would be to wait for it
        logits.masked_fill_(ignored[:, None], 0)
    return losses.masked_fill_(ignored, 0)


def _clipped(tokens: Updaters, start: int, end: int) -> list[Slice]:
    """The slices within `start:end`."""
    inside = [Slice(max(s, start), min(e, end), weight) for s, e, weight in tokens.slices]
    return [piece for piece in inside if piece.start < piece.end]
