"""The heads of the fused projection, as attention takes them, turned by their positions: one node for autograd.

As views, and a rotation for each q and k, they were a dozen nodes a layer, which cost the host more than attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

from sgtm_kernels.autograd import eager
from sgtm_kernels.plan import table_on

if TYPE_CHECKING:
    from sgtm_kernels.attention.op import HeadLayout


class Cut(NamedTuple):
    """How the columns of the projection become pieces of neighbouring heads: those that positions turn, then the rest.

    turned, rest  heads of each piece
    order         int64 [heads]: where each head of the pieces is in the projection; None: where it is in the pieces
    back          int64 [heads]: where each head of the projection is in the pieces
    """

    head_dim: int
    turned: tuple[int, ...]
    rest: tuple[int, ...]
    order: torch.Tensor | None
    back: torch.Tensor | None

    def by_group(self, pieces: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """q, k and v of each group, of pieces that are not of all together."""
        groups = len(pieces) // 3
        if self.turned:
            return list(zip(pieces[:groups], pieces[groups : 2 * groups], pieces[2 * groups :], strict=True))
        return list(zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True))


def cut(layout: HeadLayout, together: bool, turned: bool, device: torch.device) -> Cut:
    """Pieces q, k, v of all groups together, or of each group; moved only where a piece or a turn needs neighbours.

    of each group  q, k, v of the first, of the second, ...; with `turned` all q, then all k, then all v
    """
    counts = [n for q, kv in zip(layout.heads, layout.kv_heads, strict=True) for n in (q, kv, kv)]
    pieces = [list(range(*ends)) for ends in pairwise([0, *accumulate(counts)])]
    if together or turned:
        pieces = [piece for part in range(3) for piece in pieces[part::3]]
    order = [head for piece in pieces for head in piece]
    back = sorted(range(len(order)), key=order.__getitem__)
    sizes = tuple(map(len, pieces))
    if together:
        sizes = sum(layout.heads), sum(layout.kv_heads), sum(layout.kv_heads)
    first = 2 * len(sizes) // 3 if turned else 0
    if order == sorted(order):
        return Cut(layout.head_dim, sizes[:first], sizes[first:], None, None)
    indices, indices_back = (table_on(device, torch.int64, (tuple(numbers),))[0] for numbers in (order, back))
    return Cut(layout.head_dim, sizes[:first], sizes[first:], indices, indices_back)


def _forward(qkv, cos, sin, plan, cut):
    x = qkv.reshape(plan.batch, plan.seq_len, -1, cut.head_dim)
    if cut.order is not None:
        x = x.index_select(2, cut.order)
    if not cut.turned:
        return x.transpose(1, 2).split_with_sizes(cut.rest, 1)
    turned, rest = x.split_with_sizes((sum(cut.turned), sum(cut.rest)), 2)
    turned = _turn(turned, torch.empty_like(turned, memory_format=torch.contiguous_format), cos, sin, 1)
    return turned.transpose(1, 2).split_with_sizes(cut.turned, 1) + rest.transpose(1, 2).split_with_sizes(cut.rest, 1)


def _turn(x, y, cos, sin, direction: int) -> torch.Tensor:
    """y = x [B, S, heads, d], turned by cos [S, 1, d] and sin [S, 1, d / 2]; no temporaries."""
    torch.mul(x, cos, out=y)
    (real, imaginary), (y_real, y_imaginary) = x.chunk(2, -1), y.chunk(2, -1)
    y_real.addcmul_(imaginary, sin, value=-direction)
    y_imaginary.addcmul_(real, sin, value=direction)
    return y


def _keep(inputs, outputs):
    _, cos, sin, plan, cut = inputs
    return (cos, sin), plan, (cut,)


def _backward(*inputs):
    *pieces, cos, sin, plan, cut, _ = inputs
    pieces = [piece.transpose(1, 2) for piece in pieces]
    if cut.turned:
        turned, rest = torch.cat(pieces[: len(cut.turned)], 2), pieces[len(cut.turned) :]
        dx = turned.new_empty(plan.batch, plan.seq_len, sum(cut.turned) + sum(cut.rest), cut.head_dim)
        dturned, drest = dx.split_with_sizes((sum(cut.turned), sum(cut.rest)), 2)
        _turn(turned, dturned, cos, sin, -1)
        torch.cat(rest, 2, out=drest)
    else:
        dx = torch.cat(pieces, 2)
    if cut.back is not None:
        dx = dx.index_select(2, cut.back)
    return (dx.flatten(2),)


heads = eager(_forward, _keep, _backward, None)  # (qkv, cos, sin, plan, cut) -> the pieces [B, heads, S, head_dim]
