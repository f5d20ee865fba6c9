"""Causal attention on the CPU, a block of queries at a time, in matrix products over the heads of one sequence.

`scaled_dot_product_attention` walks small tiles of one head each, which small heads leave nearly empty. Here the scores
of a block of queries, for all heads of a sequence, are one product into a buffer that stays in the cache; keys that no
query of the block sees (its future, or beyond the window) are not computed. As in flash attention (Dao et al., 2022),
the backward pass computes the probabilities again.

Heads are held as [d, S], a row for each dimension: with d of 8 or 16 every product then runs along the sequence, which
is up to twice as fast. All arithmetic is fp32: rounding the probabilities to bf16 costs as much as its products save. A
sequence is computed alone: its bits do not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

ROWS = 128  # queries of a block at most: half a block of scores beyond the diagonal is computed in vain
BUFFER = 2**19  # scores of a block at most: 2 MiB, the second-level cache of one core

HEAD_DIM = 16  # up to this, it beat SDPA on two cores, forward and backward together (benchmarks/LOG.md, 2026-11-28)


def pays(like: torch.Tensor, head_dim: int) -> bool:
    """Whether this beats SDPA, on the device and in the dtype of `like`: small heads in bf16."""
    return like.device.type == "cpu" and like.dtype is torch.bfloat16 and head_dim <= HEAD_DIM


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """q [B, heads, S, d], k and v [B, kv_heads, S, d] -> [B, S, heads * d]."""
    window = q.shape[2] if window is None else min(window, q.shape[2])
    return _Blocks.apply(q, k, v, scale, window)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, window):
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.window = scale, window
        blocks = _Probabilities(q, k, scale, window)
        v, out = _by_dimension(v), torch.empty_like(blocks.q)
        for sequence in range(len(out)):
            for queries, keys, _, p in blocks.of(sequence):
                out[sequence, ..., queries] = blocks.heads(v[sequence, ..., keys] @ p.transpose(1, 2))
        return _by_token(out, q).flatten(2)

    @staticmethod
    def backward(ctx, dy):
        q, k, v = ctx.saved_tensors
        blocks = _Probabilities(q, k, ctx.scale, ctx.window)
        d_out = _by_dimension(dy.unflatten(-1, (q.shape[1], -1)).transpose(1, 2))
        values, dq = _by_dimension(v), torch.empty_like(blocks.q)
        dk, dv = torch.zeros_like(blocks.k), torch.zeros_like(values)
        buffer = torch.empty_like(blocks.buffer)
        for sequence in range(len(dq)):
            for queries, keys, q_block, p in blocks.of(sequence):
                dy_block = blocks.grouped(d_out[sequence, ..., queries])
                ds = buffer[: p.numel()].view(p.shape)
                torch.bmm(dy_block.transpose(1, 2), values[sequence, ..., keys], out=ds)
                torch.ops.aten._softmax_backward_data.out(ds, p, -1, ds.dtype, grad_input=ds)
                dq[sequence, ..., queries] = blocks.heads(blocks.k[sequence, ..., keys] @ ds.transpose(1, 2))
                dk[sequence, ..., keys].add_(q_block @ ds)  # `+=` would copy the slice onto itself
                dv[sequence, ..., keys].add_(dy_block @ p)
        if ctx.scale != 1:
            dq *= ctx.scale
        return *(_by_token(dx, x).transpose(1, 2) for dx, x in ((dq, q), (dk, k), (dv, v))), None, None


class _Probabilities:
    """Blocks of attention probabilities of q [B, heads, S, d] on k [B, kv_heads, S, d].

    The query heads of a KV head are rows of one product. `q` (times the scale) and `k` are fp32 [B, heads, d, S].
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, scale: float, window: int):
        self.q, self.k, self.window = _by_dimension(q), _by_dimension(k), window
        if scale != 1:
            self.q *= scale
        self.kv_heads, self.seq_len = k.shape[1], q.shape[2]
        self.rows = _rows(q.shape[1], self.seq_len)
        self.buffer = torch.empty(q.shape[1] * self.rows * self.seq_len)

    def of(self, sequence: int) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
        """Queries of a block, the keys that one of them sees, q [kv_heads, d, queries of all heads of a KV head], and
        the probabilities [kv_heads, queries of all heads of a KV head, keys], valid until the next block."""
        q, k = self.q[sequence], self.k[sequence]
        for start in range(0, self.seq_len, self.rows):
            end = min(start + self.rows, self.seq_len)
            block, keys = self.grouped(q[..., start:end]), slice(max(0, start - self.window + 1), end)
            yield slice(start, end), keys, block, self._softmax(block, k[..., keys], end - start)

    def _softmax(self, q: torch.Tensor, k: torch.Tensor, n: int) -> torch.Tensor:
        shape = (self.kv_heads, q.shape[2], k.shape[2])
        p = self.buffer[: shape[0] * shape[1] * shape[2]].view(shape)
        torch.bmm(q.transpose(1, 2), k, out=p)
        by_query, ahead = p.view(-1, n, k.shape[2]), k.shape[2] - n
        by_query[..., ahead:].add_(_future(n))
        if ahead + n > self.window:
            by_query[..., : ahead + n - self.window].add_(_beyond(n, ahead, self.window))
        return torch.softmax(p, -1, out=p)

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """[heads, d, rows] -> [kv_heads, d, heads / kv_heads * rows]; a view where each head has keys of its own."""
        if len(x) == self.kv_heads:
            return x
        return x.unflatten(0, (self.kv_heads, -1)).transpose(1, 2).flatten(2)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """What `grouped` made, back into [heads, d, rows]."""
        heads = self.q.shape[1]
        if heads == self.kv_heads:
            return x
        return x.unflatten(2, (heads // self.kv_heads, -1)).transpose(1, 2).flatten(0, 1)


def _by_dimension(x: torch.Tensor) -> torch.Tensor:
    """[B, heads, S, d] -> fp32 [B, heads, d, S]."""
    x = x.transpose(2, 3)
    return torch.empty(x.shape, dtype=torch.float32).copy_(x)


def _by_token(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """fp32 [B, heads, d, S] -> [B, S, heads, d] in the dtype of `like`."""
    x = x.permute(0, 3, 1, 2)
    return torch.empty(x.shape, dtype=like.dtype).copy_(x)


def _rows(heads: int, seq_len: int) -> int:
    """Queries of a block."""
    return min(seq_len, max(16, BUFFER // (heads * seq_len) // 16 * 16), ROWS)


@lru_cache(maxsize=32)
def _future(n: int) -> torch.Tensor:
    """[n, n] additive mask of a block of queries over its own keys."""
    return torch.full((n, n), -torch.inf).triu_(1)


@lru_cache(maxsize=32)
def _beyond(n: int, ahead: int, window: int) -> torch.Tensor:
    """[n, ahead + n - window] additive mask: query i is key ahead + i and sees none before ahead + i - window + 1."""
    i, j = torch.arange(n)[:, None], torch.arange(ahead + n - window)
    return torch.zeros(n, ahead + n - window).masked_fill_(j <= ahead + i - window, -torch.inf)
