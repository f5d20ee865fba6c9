"""Causal attention on the CPU, a block of queries at a time, in matrix products over the heads of one sequence.

`scaled_dot_product_attention` walks small tiles of one head each, which small heads leave nearly empty. Here the scores
of a block of queries, for all heads of a sequence, are one product into a buffer that stays in the cache; keys that no
query of the block sees (its future, or beyond the window) are not computed. As in flash attention (Dao et al., 2022),
scores and their softmax are fp32, probabilities enter the products in the dtype of `q`, and the backward pass computes
them again. A sequence is computed alone: its bits do not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

ROWS = 64  # queries of a block at most: half a block of scores beyond the diagonal is computed in vain
BUFFER = 2**20  # scores of a block at most: 4 MiB in fp32, which stays in the cache

# Where it beat SDPA on two cores, forward and backward together (benchmarks/LOG.md, 2026-11-22).
HEADS, HEAD_DIM = 8, 32


def pays(q: torch.Tensor) -> bool:
    """Whether this beats SDPA, for q [B, heads, S, d]: many small heads in bf16."""
    return q.device.type == "cpu" and q.dtype is torch.bfloat16 and q.shape[1] >= HEADS and q.shape[3] <= HEAD_DIM


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """q [B, heads, S, d], k and v [B, kv_heads, S, d] -> [B, S, heads * d]."""
    window = q.shape[2] if window is None else min(window, q.shape[2])
    return _Blocks.apply(q, k, v, scale, window)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, window):
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.window = scale, window
        batch, heads, seq_len, dim = q.shape
        out = q.new_empty(batch, seq_len, heads, dim)
        buffer = _buffer(heads, seq_len)
        for sequence in range(batch):
            one = _Sequence(q[sequence], k[sequence], scale, window, buffer)
            values = v[sequence].contiguous()
            for queries, keys in one.blocks():
                p = one.probabilities(queries, keys).to(v.dtype)
                one.store(out[sequence, queries], p @ values[:, keys])
        return out.flatten(2)

    @staticmethod
    def backward(ctx, dy):
        q, k, v = ctx.saved_tensors
        batch, heads, seq_len, dim = q.shape
        dy = dy.unflatten(-1, (heads, dim))
        dq = q.new_empty(batch, seq_len, heads, dim)
        dk, dv = (torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (k, v))
        buffer = _buffer(heads, seq_len)
        for sequence in range(batch):
            one = _Sequence(q[sequence], k[sequence], ctx.scale, ctx.window, buffer)
            raw_keys, values_t = k[sequence].contiguous(), v[sequence].transpose(1, 2)
            sums = torch.zeros(2, *k.shape[1:], dtype=torch.float32)  # of dk and dv
            for queries, keys in one.blocks():
                p = one.probabilities(queries, keys).to(v.dtype)
                d_out = one.grouped(dy[sequence, queries].transpose(0, 1))
                dp = d_out @ values_t[:, :, keys]
                ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
                one.store(dq[sequence, queries], (ds @ raw_keys[:, keys]).mul_(ctx.scale))
                sums[0, :, keys] += ds.transpose(1, 2) @ one.grouped(q[sequence, :, queries])
                sums[1, :, keys] += p.transpose(1, 2) @ d_out
            dk[sequence] = sums[0].mul_(ctx.scale).transpose(0, 1)
            dv[sequence] = sums[1].transpose(0, 1)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None, None


class _Sequence:
    """One sequence: q [heads, S, d], k [kv_heads, S, d]. The query heads of a KV head are rows of one product."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, scale: float, window: int, buffer: torch.Tensor):
        self.window, self.kv_heads, self.seq_len = window, k.shape[0], q.shape[1]
        self.q = q.float() * scale
        self.k_t = k.float().transpose(1, 2)
        self.rows = _rows(q.shape[0], self.seq_len)
        self.buffer = buffer

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Blocks of queries, and the keys that one of them sees."""
        for start in range(0, self.seq_len, self.rows):
            end = min(start + self.rows, self.seq_len)
            yield slice(start, end), slice(max(0, start - self.window + 1), end)

    def probabilities(self, queries: slice, keys: slice) -> torch.Tensor:
        """fp32 [kv_heads, queries of all heads of a KV head, keys], valid until the next call."""
        q = self.grouped(self.q[:, queries])
        shape = (*q.shape[:2], keys.stop - keys.start)
        scores, p = (half[: shape[0] * shape[1] * shape[2]].view(shape) for half in self.buffer)
        torch.bmm(q, self.k_t[:, :, keys], out=scores)
        n, ahead = queries.stop - queries.start, queries.start - keys.start
        by_query = scores.unflatten(1, (-1, n))
        by_query[..., ahead:] += _future(n)
        if ahead + n > self.window:
            by_query[..., : ahead + n - self.window] += _beyond(n, ahead, self.window)
        return torch.softmax(scores, -1, out=p)

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """[heads, rows, d] -> [kv_heads, heads / kv_heads * rows, d]."""
        return x.reshape(self.kv_heads, -1, x.shape[-1])

    def store(self, to: torch.Tensor, x: torch.Tensor) -> None:
        """What `grouped` made, back into [rows, heads, d]."""
        to.copy_(x.view(to.shape[1], to.shape[0], -1).transpose(0, 1))


def _rows(heads: int, seq_len: int) -> int:
    """Queries of a block."""
    return min(seq_len, max(16, BUFFER // (heads * seq_len) // 16 * 16), ROWS)


def _buffer(heads: int, seq_len: int) -> torch.Tensor:
    """Room for the scores of a block and for their softmax."""
    return torch.empty(2, heads * _rows(heads, seq_len) * seq_len)


@lru_cache(maxsize=32)
def _future(n: int) -> torch.Tensor:
    """[n, n] additive mask of a block of queries over its own keys."""
    return torch.full((n, n), -torch.inf).triu_(1)


@lru_cache(maxsize=32)
def _beyond(n: int, ahead: int, window: int) -> torch.Tensor:
    """[n, ahead + n - window] additive mask: query i is key ahead + i and sees none before ahead + i - window + 1."""
    i, j = torch.arange(n)[:, None], torch.arange(ahead + n - window)
    return torch.zeros(n, ahead + n - window).masked_fill_(j <= ahead + i - window, -torch.inf)
