"""LM head and cross-entropy on cuBLAS, with one Triton kernel for each chunk: logits in, losses and gradient out.

The kernel reads a token's logits twice and writes their gradient over them once: the maximum and the sum of the
exponentials come out of one pass, in fp32, and nothing of the logits' size exists beside them. Rows of logits begin at
multiples of 128 bytes, whatever the vocabulary: with 50,257 columns in bf16 every other row of a packed matrix would
begin between two words, for the loads of this kernel and for those of three matmuls. The padding of a row belongs to
the kernel: it is read with the row, counts as -inf, and becomes 0 where the gradient is written, so that accesses are
bounded by the length of the padded row and are 128 bits wide at any vocabulary. Matmuls read no padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.library import custom_op

from sgtm_kernels.autograd import captured, eager, existing, register
from sgtm_kernels.cross_entropy.pytorch import IGNORE, ChunkOps, in_chunks
from sgtm_kernels.cross_entropy.reference import label_sums
from sgtm_kernels.plan import MaskPlan, plan_of
from sgtm_kernels.triton_common.tuning import DTYPES, Tunable, bucket

# A chunk's logits: 10,682 tokens of 50,257 in bf16. Every further chunk reads and writes the head's gradient in fp32.
CHUNK_BYTES = 2**30
ROW_BYTES = 128  # rows of logits begin at multiples of it
# Logits of a row that are in flight at a time. Many warps for a row, so that few rows are in flight and the second
# pass finds them in the L2 cache: on 132 multiprocessors two rows of 100 kB each are 27 MB.
BLOCK, WARPS = 8192, 32


class Tile(NamedTuple):
    block: int
    warps: int


def _heuristic(dtype: str, columns: int) -> Tile:
    return Tile(columns, max(1, columns * WARPS // BLOCK))


# By dtype, and the row's length up to BLOCK.
LONG_ROWS = (Tile(4096, 16), Tile(8192, 16), Tile(16384, 32))
TILE = Tunable("token_losses", _heuristic, {("bf16", 8192): LONG_ROWS})


def linear_cross_entropy(x, weight, bias, targets, plan: MaskPlan, scale):
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    if captured():
        total, sums, *_ = head_and_loss(x, weight, bias, targets, plan.handle, len(plan.tables.labels), wanted)
        return total * scale, sums
    return eager_head_and_loss(x, weight, bias, targets, plan, scale, wanted)


def _forward(x, weight, bias, targets, plan, scale, wanted):
    """`scale` times the losses' sum, sums by label, and the gradients of the losses' sum with respect to x, weight and
    bias."""
    ops = ChunkOps(_logits, _softmax_gradient_, CHUNK_BYTES)
    losses, *gradients = in_chunks(x, weight, bias, targets.contiguous(), plan, wanted, ops)
    total = losses.sum()
    return total if scale is None else total * scale, label_sums(losses, plan), *gradients


def _keep(inputs, outputs):
    return outputs[2:], inputs[4], inputs[5:]


def _backward(dtotal, *saved):
    *gradients, _plan, scale, _wanted, _needed = saved
    factor = dtotal * scale
    return tuple(None if gradient is None else gradient * factor for gradient in gradients)


eager_head_and_loss = eager(_forward, _keep, _backward, outputs=(1, 2))


@custom_op(
    "sgtm::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor targets, Tensor plan, int labels, bool[3] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def head_and_loss(x, weight, bias, targets, plan, labels, wanted):
    results = _forward(x, weight, bias, targets, plan_of(plan), None, wanted)
    return existing(x, *(None if tensor is None else tensor.contiguous() for tensor in results))


@head_and_loss.register_fake
def _(x, weight, bias, targets, plan, labels, wanted):
    total = x.new_empty((), dtype=torch.float32)
    parts = zip((x, weight, bias), wanted, strict=True)
    return (
        total,
        total.new_empty(labels),
        *(part.new_empty(part.shape) if want else x.new_empty(0) for part, want in parts),
    )


def _captured(dtotal, *saved):
    *gradients, _handle, _scale, computed, _needed = saved
    pairs = zip(gradients, computed, strict=True)
    return tuple(gradient * dtotal if is_computed else None for gradient, is_computed in pairs)


register(head_and_loss, _keep, _captured)


def _logits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear for x [n, D], with padded rows."""
    vocab, step = weight.shape[0], ROW_BYTES // x.element_size()
    out = x.new_empty(len(x), -(-vocab // step) * step)[:, :vocab]
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _softmax_gradient_(logits: torch.Tensor, targets: torch.Tensor, gradient: bool) -> torch.Tensor:
    n, vocab = logits.shape
    losses = torch.empty(n, dtype=torch.float32, device=logits.device)
    block, warps = _tile(logits)
    token_losses[(n,)](
        logits, targets, losses, logits.stride(0), vocab,
        IGNORE=IGNORE, GRADIENT=gradient, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return losses


def _tile(logits: torch.Tensor) -> Tile:
    return TILE(logits.device, DTYPES[logits.dtype], bucket(logits.shape[1], 1, BLOCK))


@triton.jit
def token_losses(
    logits, targets, losses, row, vocab, IGNORE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """Program t: the loss of token t, and the gradient over its logits. A target that does not exist gives NaN.

    row  distance of two rows in elements, the padding of a row included
    """
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + token)
    z_at = logits + token * row
    column = tl.arange(0, BLOCK)
    if target == IGNORE:
        tl.store(losses + token, 0.0)
        if GRADIENT:
            nothing = tl.zeros([BLOCK], dtype=logits.dtype.element_ty)
            for start in range(0, row, BLOCK):
                tl.store(z_at + start + column, nothing, mask=start + column < row)
    else:
        exists = (target >= 0) & (target < vocab)
        z_target = tl.load(z_at + target, mask=exists, other=float("nan")).to(tl.float32)
        largest = -3.4028234663852886e38  # finite, so that a block of -inf is a sum of 0
        total = 0.0
        for start in range(0, row, BLOCK):
            z = _block(z_at, start + column, row, vocab)
            before = largest
            largest = tl.maximum(before, tl.max(z, 0))
            total = total * tl.exp(before - largest) + tl.sum(tl.exp(z - largest), 0)
        tl.store(losses + token, largest - z_target + tl.log(total))
        if GRADIENT:
            scale = 1.0 / total
            for start in range(0, row, BLOCK):
                entries = start + column
                z = _block(z_at, entries, row, vocab)
                p = tl.exp(z - largest) * scale - tl.where(entries == target, 1.0, 0.0)
                p = tl.where(entries < vocab, p, 0.0)  # even where the sum is NaN
                tl.store(z_at + entries, p.to(logits.dtype.element_ty), mask=entries < row)


@triton.jit
def _block(z_at, entries, row, vocab):
    """Logits of a row in fp32, -inf beyond the vocabulary. The mask of the load ends with the padding, at a multiple of
    16: one that ended with the vocabulary would make a load of every logit."""
    z = tl.load(z_at + entries, mask=entries < row, other=float("-inf")).to(tl.float32)
    return tl.where(entries < vocab, z, float("-inf"))
