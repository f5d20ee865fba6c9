"""Ops that are opaque to a compiled graph, since their work depends on a plan, and factors per token as tensors.

An op takes the plan as its handle (sgtm_kernels/plan.py), so that one graph serves every plan. Inside a graph the
`torch` backend is made of plain torch and of these ops (`compiled.py` of each op's folder). They have no gradient of
their own: they run in the backward pass, or where none is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.library import Library, register_fake

from sgtm_kernels.autograd import captured
from sgtm_kernels.plan import MaskPlan, plan_of
from sgtm_kernels.scale import products

_LIBRARY = Library("sgtm", "FRAGMENT")


def define(schema: str, function: Callable, fake: Callable) -> Callable:
    """The op `sgtm::<name>` of a schema `name(...) -> ...`, none of whose outputs may alias an input.

    Half the cost of `torch.library.custom_op`, which also handles gradients.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, function, key)
    register_fake(f"sgtm::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.sgtm, name).default


def _factors(like: torch.Tensor, plan: torch.Tensor, groups: int) -> torch.Tensor:
    masks = plan_of(plan)
    active, route = ([masks.column(table, g) for g in range(groups)] for table in ("active", "route"))
    both = masks.factors((*active, *map(products, active, route)), like.device)
    # A copy: the compiler may overwrite the result of an op.
    return both.to(like.dtype, copy=True).view(2, groups, *like.shape[:2], 1)


factors = define(
    "factors(Tensor like, Tensor plan, int groups) -> Tensor",
    _factors,
    lambda like, plan, groups: like.new_empty(2, groups, *like.shape[:2], 1),
)
"""[2, groups, B, S, 1], dtype of `like` [B, S, ...]: `active` of each token, and the factor of its gradient."""


def _positions(input_ids: torch.Tensor, plan: torch.Tensor) -> torch.Tensor:
    return positions(input_ids, plan_of(plan)).contiguous()


_captured_positions = define(
    "positions(Tensor input_ids, Tensor plan) -> Tensor",
    _positions,
    lambda input_ids, plan: torch.empty_like(input_ids, memory_format=torch.contiguous_format),
)


def positions(input_ids: torch.Tensor, plan: MaskPlan) -> torch.Tensor:
    """int64 [B, S]: the position of each token in its sequence, or in its document where documents are isolated."""
    if captured():
        return _captured_positions(input_ids, plan.handle)
    in_sequence = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    if plan.documents is None:
        return in_sequence
    return in_sequence - plan.spans(input_ids.device)[0].view_as(input_ids)


def scale_groups(pieces: Iterable[torch.Tensor], plan: MaskPlan, like: torch.Tensor) -> list[torch.Tensor]:
    """Each group's output [B, S, columns] times `active`, with the gradient that `route` leaves; 0 where that is 0.

    like  [B, S, ...], in memory in any case: the op takes it, so the compiler could not fuse it away
    """
    pieces = list(pieces)
    output, gradient = factors(like.detach(), plan.handle, len(pieces))
    return [_Scale.apply(piece, output[g], gradient[g]) for g, piece in enumerate(pieces)]


class _Scale(torch.autograd.Function):
    """x times `output`, whose gradient is that of the result times `gradient`; exactly 0 where the factor is."""

    @staticmethod
    def forward(ctx, x, output, gradient):
        ctx.save_for_backward(gradient)
        return torch.where(output == 0, 0.0, x * output)

    @staticmethod
    def backward(ctx, dy):
        (gradient,) = ctx.saved_tensors
        return torch.where(gradient == 0, 0.0, dy * gradient), None, None
