"""FlexAttention (torch.nn.attention) over windows and documents: one compiled function for every micro-batch.

Which keys a query sees is one tensor, the first of them, so that a window and documents of any lengths are the same
graph; sizes of the batch are dynamic from the first call on. Compiled for CUDA, forward and backward are deterministic:
programs of the backward pass do a block of queries or one of keys, and none adds to what another writes.
"""

from __future__ import annotations

from functools import cache

import torch
import torch._dynamo
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sgtm_kernels.attention.visible import Visible

BLOCK = 128  # queries and keys; the default of create_block_mask
# Compiled for each number of heads of a group, for one sequence and for several, with and without gradients: with three
# sizes of groups more than the 8 that torch allows by default.
VARIANTS = 64


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, visible: Visible) -> torch.Tensor:
    """q [B, heads, S, d], k and v [B, kv_heads, S, d] -> [B, S, heads * d]; d at least 16 on CUDA.

    On a CPU, where torch has no backward pass of it, the traced graph runs as it is.
    """
    function = compiled("inductor" if q.is_cuda else "eager")
    _free(q, k, v)
    return function(q, k, v, block_mask(visible, q.device), scale).transpose(1, 2).flatten(2)


def block_mask(visible: Visible, device: torch.device) -> BlockMask:
    """The blocks of keys that each block of queries sees, in part or whole; cached in the plan.

    As create_block_mask makes it, but from the first keys alone and not from a mask of all pairs.
    """
    key = ("block_mask", visible.first, visible.last, visible.window, device)
    return visible.plan.cached(key, lambda: _block_mask(visible.first_keys(device)))


def _block_mask(first: torch.Tensor) -> BlockMask:
    """first: see Visible.first_keys. As no first key falls, a block of queries sees one range of keys."""
    seq_len = first.shape[1]
    start = torch.arange(0, seq_len, BLOCK, device=first.device)
    end = (start + BLOCK).clamp(max=seq_len)
    lowest, highest = first[:, start, None], first[:, end - 1, None]
    partial = (start <= start[:, None]) & (end > lowest)
    whole = (start < start[:, None]) & (start >= highest) & (end - start == BLOCK)[:, None]
    tables = (*_listed(partial & ~whole), *_listed(whole))

    def sees(batch, head, query, key):
        return (key <= query) & (key >= first[batch, query])

    mask = BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(seq_len, seq_len))
    _free(first, *tables, mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices)
    return mask


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [B, queries, keys] -> int32 [B, 1, queries], how many blocks of keys, and [..., keys], which, first."""
    which = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], which.int()[:, None]


def _free(*tensors: torch.Tensor | None) -> None:
    """The first size of these changes from call to call: compile for any. None: a table that the mask lacks."""
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


@cache
def compiled(backend: str):
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    return torch.compile(whole_graph, backend=backend, fullgraph=True)


def whole_graph(q, k, v, block_mask, scale):
    """A function of our own: torch counts variants by function, and others may compile flex_attention too."""
    return flex_attention(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
