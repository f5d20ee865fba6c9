"""A mixture of SwiGLU experts whose groups are whole experts: the router's choice, and the experts themselves.

A token chooses among the experts of the groups that are active for its label, so that an inactive group's experts are
out of reach: their logits count as -inf. `per_token` of them are chosen, or all where fewer are active; their weights
are the softmax of their logits (Mixtral, arXiv 2401.04088, section 2.1) and add up to 1, or there are none.

Promises (tests/kernels/test_experts.py): what a token gets, and its part of every gradient, do not depend in any bit on
tokens of other labels, on their number at an expert neither; rows that no token may update have a gradient of exactly
0, those of an expert without tokens too; dX is that of unmasked weights.

There is no kernel for it: `torch` serves `triton`. Its matrices are as large as the tokens at an expert, so the counts
are copied to the CPU once a layer.
"""

from __future__ import annotations

import torch

from sgtm_kernels.experts import pytorch, reference
from sgtm_kernels.plan import MaskPlan


def route(
    logits: torch.Tensor, per_token: int, plan: MaskPlan, bounds: tuple[int, ...], backend: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, in the dtype of the logits, and int64 numbers of the chosen experts, both [B, S, per_token].

    logits  [B, S, experts]; `route` of the tables multiplies what flows back to those of a group
    bounds  group boundaries in the experts; two entries mean no groups: all experts are in reach
    A place without an expert has weight 0 and the number of experts in place of one.
    """
    plan.check(logits)
    plan.check_bounds(bounds, logits.shape[-1])
    if not 1 <= per_token <= bounds[-1]:
        raise ValueError(f"{per_token} of {bounds[-1]} experts cannot be chosen for a token; take 1 to {bounds[-1]}")
    return _module(backend).route(logits, plan, per_token, bounds)


def experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    plan: MaskPlan,
    bounds: tuple[int, ...],
    shared: int = 0,
    backend: str = "torch",
) -> torch.Tensor:
    """Sum of the chosen experts' outputs times their weights, and of the shared experts': x [B, S, D] -> [B, S, D].

    weights, chosen  what `route` returns
    w_in             [2 F (shared + experts), D]: for each expert of F neurons, shared ones first, its gates and its ups
    w_out            [F (shared + experts), D]
    bounds           as in `route`; shared experts belong to the first group
    """
    plan.check_product(x, None, w_in.shape[1], w_in.shape[0])
    plan.check_bounds(bounds, bounds[-1])
    if w_in.shape[0] != 2 * w_out.shape[0] or w_out.shape[0] % (shared + bounds[-1]):
        raise ValueError(
            f"{shared} shared and {bounds[-1]} other experts do not divide w_out of {w_out.shape[0]} rows and w_in of "
            f"{w_in.shape[0]}, which must be twice as many"
        )
    return _module(backend).experts(x, weights, chosen, w_in, w_out, plan, bounds, shared)


def _module(backend: str):
    return reference if backend == "reference" else pytorch
