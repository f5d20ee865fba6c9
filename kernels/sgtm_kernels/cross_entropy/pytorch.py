"""LM head and cross-entropy chunk by chunk; gradients are computed in the forward pass, while the logits are at hand.

The loss is linear in `scale`, so the backward pass only multiplies by the incoming gradient. A chunk whose tokens may
not update the head skips that matmul; where a single slice of tokens updates it, its gradient is that matmul's
result, else the partial results are added in fp32. The chunks are those of every backend that has a `ChunkOps`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sgtm_kernels.cross_entropy.reference import label_sums
from sgtm_kernels.plan import MaskPlan, Slice, Updaters

IGNORE = -100
# A chunk's logits take at most this much, in the dtype of the model: 2,670 tokens of 50,257 logits in bf16.
CHUNK_BYTES = 2**28
# Tokens whose softmax is in flight in fp32 at a time. On a CPU 3 MB of 50,257 logits, which stay in the cache; on a GPU
# more, as every block costs nine launches.
ROWS, GPU_ROWS = 16, 1024


class ChunkOps(NamedTuple):
    """What a backend does with a chunk of n tokens.

    logits      (x [n, D], weight, bias) -> logits [n, V], which may be overwritten
    gradient_   (logits, targets [n], wanted) -> token losses [n]; where `wanted`, overwrites the logits with the
                gradient of the sum of the losses, softmax - one_hot (0: no target)
    chunk_bytes a chunk's logits take at most this much
    """

    logits: Callable[..., torch.Tensor]
    gradient_: Callable[..., torch.Tensor]
    chunk_bytes: int


def linear_cross_entropy(x, weight, bias, targets, plan: MaskPlan, scale):
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    loss, losses = _LinearCrossEntropy.apply(x, weight, bias, targets, plan, scale, wanted)
    return loss, label_sums(losses, plan)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, targets, plan, scale, wanted):
        ops = ChunkOps(F.linear, _softmax_gradient_, CHUNK_BYTES)
        losses, *gradients = in_chunks(x, weight, bias, targets, plan, wanted, ops)
        ctx.scale = scale
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(losses)
        return losses.sum() * scale, losses

    @staticmethod
    def backward(ctx, dloss, _):
        factor = dloss * ctx.scale
        return (*(None if g is None else g * factor for g in ctx.saved_tensors), *[None] * 4)


def in_chunks(x, weight, bias, targets, plan: MaskPlan, wanted: Sequence[bool], ops: ChunkOps):
    """Losses of all tokens, and the gradients of their sum with respect to x, weight and bias, where `wanted`."""
    need_x, need_w, need_b = wanted
    flat, targets = x.flatten(0, 1), targets.flatten()
    wide = torch.promote_types(x.dtype, torch.float32)
    losses = torch.empty(plan.tokens, dtype=wide, device=x.device)
    dx = torch.empty_like(flat) if need_x else None
    dw, db = (_Sum(parameter) if need else None for parameter, need in ((weight, need_w), (bias, need_b)))
    chunk = max(ROWS, ops.chunk_bytes // (weight.shape[0] * weight.element_size()))
    for start in range(0, plan.tokens, chunk):
        end = min(start + chunk, plan.tokens)
        logits = ops.logits(flat[start:end], weight, bias)
        losses[start:end] = ops.gradient_(logits, targets[start:end], need_x or need_w or need_b)
        if dx is not None:
            torch.mm(logits, weight, out=dx[start:end])
        if dw is not None:
            for s, e, factor in _clipped(plan.joint("head"), start, end):
                dw.add(logits[s - start : e - start].t() @ flat[s:e], factor)
        if db is not None:
            for s, e, factor in _clipped(plan.joint("head_bias"), start, end):
                db.add(logits[s - start : e - start].sum(0), factor)
        del logits  # or the next chunk's would be made beside it
    learned = (None if gradient is None else gradient.total() for gradient in (dw, db))
    return losses, None if dx is None else dx.view_as(x), *learned


class _Sum:
    """Gradient of a parameter, from partial results in its dtype."""

    def __init__(self, like: torch.Tensor):
        self.like = like
        self.value: torch.Tensor | None = None

    def add(self, partial: torch.Tensor, factor: float) -> None:
        if self.value is None:
            self.value = partial if factor == 1 else partial.mul_(factor)
        else:
            wide = torch.promote_types(partial.dtype, torch.float32)
            self.value = self.value.to(wide).add_(partial, alpha=factor)

    def total(self) -> torch.Tensor:
        if self.value is None:
            return self.like.new_zeros(()).expand_as(self.like)  # one number: the backward pass writes the product
        return self.value.to(self.like.dtype)


def _softmax_gradient_(logits: torch.Tensor, targets: torch.Tensor, gradient: bool) -> torch.Tensor:
    """`ChunkOps.gradient_` in torch, a few rows at a time.

    A row's loss is -log p of its target, which needs no pass of its own over the logits, unless p is next to nothing.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    ignored = targets == IGNORE
    index = targets.masked_fill(ignored, 0)[:, None]
    losses = torch.empty(len(targets), dtype=wide, device=logits.device)
    block = min(GPU_ROWS if logits.is_cuda else ROWS, len(targets))
    buffer = torch.empty(block, logits.shape[1], dtype=wide, device=logits.device)
    for start in range(0, len(targets), block):
        rows = slice(start, start + block)
        p = buffer[: len(index[rows])].copy_(logits[rows])
        p = torch.softmax(p, dim=-1, out=None if p.is_cuda else p)  # in place only on a CPU; not tested on a GPU
        losses[rows] = _losses(logits[rows], p, index[rows])
        if gradient:
            logits[rows] = p.scatter_add_(1, index[rows], torch.full_like(index[rows], -1, dtype=wide))
    if gradient and (logits.is_cuda or ignored.any()):  # on a GPU, `any` would wait for the device
        logits.masked_fill_(ignored[:, None], 0)
    return losses.masked_fill_(ignored, 0)


def _losses(logits: torch.Tensor, p: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[n] negative logarithms of the softmax `p` of logits [n, V] at index [n, 1], to the precision of `p`."""
    if logits.is_cuda:  # a check for small ones would wait for the GPU, so all losses go by the largest logit
        largest, argmax = logits.max(-1, keepdim=True)
        return (largest.to(p.dtype) - logits.gather(1, index).to(p.dtype) - p.gather(1, argmax).log_()).squeeze(1)
    picked = p.gather(1, index).squeeze(1)
    losses, small = -picked.log(), picked < torch.finfo(p.dtype).tiny
    if small.any():
        rest = logits[small].to(p.dtype)
        losses[small] = torch.logsumexp(rest, -1) - rest.gather(1, index[small]).squeeze(1)
    return losses


def _clipped(tokens: Updaters, start: int, end: int) -> list[Slice]:
    """The slices within `start:end`."""
    inside = [Slice(max(s, start), min(e, end), weight) for s, e, weight in tokens.slices]
    return [piece for piece in inside if piece.start < piece.end]
