"""Causal attention with `active` and `route` per label and group of heads.

Promises (tests/kernels/test_attention.py): an inactive (label, group) pair's output is exactly 0 and its heads get
exactly no gradient; `route` leaves the forward value bit for bit; documents do not attend to one another; a query
sees at most the `window` last keys, its own position included (as in Hugging Face's GPT-Neo).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgtm_kernels.dispatch import pick
from sgtm_kernels.plan import MaskPlan


@dataclass(frozen=True)
class HeadLayout:
    """Columns of the fused projection: for each group its query heads, its key heads, its value heads.

    heads, kv_heads  number of query and KV heads of each group; within a group, query heads `i*q:(i+1)*q` share KV
                     head i
    """

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    head_dim: int

    def split(self, qkv: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """[B, S, columns] -> for each group q [B, heads, S, head_dim] and k, v [B, kv_heads, S, head_dim], as views."""
        counts = [n for q, kv in zip(self.heads, self.kv_heads, strict=True) for n in (q, kv, kv)]
        pieces = [
            piece.unflatten(-1, (n, self.head_dim)).transpose(1, 2)
            for n, piece in zip(counts, qkv.split([n * self.head_dim for n in counts], dim=-1), strict=True)
        ]
        return [tuple(pieces[i : i + 3]) for i in range(0, len(pieces), 3)]


def attention(
    qkv: torch.Tensor,
    layout: HeadLayout,
    plan: MaskPlan,
    *,
    scale: float,
    window: int | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    overwrite: bool = False,
    below: bool = True,
    backend: str = "torch",
) -> torch.Tensor:
    """qkv [B, S, columns of `layout`] -> [B, S, sum(heads) * head_dim], group-major.

    scale   multiplies q k^T (1 for GPT-Neo, head_dim**-0.5 for Llama)
    window  how many keys a query sees at most; None: all of its past
    rotary  cos and sin [S, head_dim], applied to q and k (rotary position embedding, Su et al., 2021); both halves of
            a row are alike, as they turn together
    overwrite  whether q and k may be turned in place: no other op reads qkv, and the op that made it did not save it
    below   whether what is below the projection learns. Where it does not, a backend may leave the gradient of a group
            at 0 whose rows of the projection learn from no token: nothing else would read it
    """
    plan.check(qkv)
    columns = (sum(layout.heads) + 2 * sum(layout.kv_heads)) * layout.head_dim
    if qkv.shape[-1] != columns or len(layout.heads) not in (1, len(plan.tables.groups)):
        groups = len(plan.tables.groups)
        raise ValueError(f"a projection of {qkv.shape[-1]} columns for {groups} groups is not of {layout}")
    return pick("attention", backend).attention(qkv, layout, plan, scale, window, rotary, overwrite, below)


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary position embedding, the halves of the head as real and imaginary parts: x [B, heads, S, head_dim]."""
    cos, sin = (table.to(x.dtype) for table in rotary)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
