"""A mixture of SwiGLU experts whose groups are whole experts: the router's choice, a loss that balances it, and the
experts themselves.

A token chooses among the experts of the groups that are active for its label, so that an inactive group's experts are
out of reach: their logits count as -inf. `per_token` of them are chosen, or all where fewer are active; their weights
are the softmax of their logits (Mixtral, arXiv 2401.04088, section 2.1) and add up to 1, or there are none.

Promises (tests/kernels/test_experts.py): what a token gets, and its part of every gradient, do not depend in any bit on
tokens of other labels, on their number at an expert neither; rows that no token may update have a gradient of exactly
0, those of an expert without tokens too; dX is that of unmasked weights. All of it holds with `balance` too.

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


def choices(
    chosen: torch.Tensor, counted: torch.Tensor, plan: MaskPlan, bounds: tuple[int, ...], backend: str = "torch"
) -> torch.Tensor:
    """int64 [labels, experts]: how often the tokens of each label have chosen each expert.

    chosen   what `route` returns
    counted  bool [B, S]: the tokens that count
    bounds   as in `route`
    """
    plan.check(chosen)
    plan.check(counted)
    return _module(backend).choices(chosen, counted, plan, bounds)


def balance(
    logits: torch.Tensor,
    chosen: torch.Tensor,
    counted: torch.Tensor,
    plan: MaskPlan,
    bounds: tuple[int, ...],
    backend: str = "torch",
) -> torch.Tensor:
    """Sum over the labels of n E sum_i f_i P_i: a scalar, fp32 (fp64 for fp64 logits).

    n is the number of the label's tokens that count, E that of the experts of its active groups, f_i the share of the
    choices of these tokens that fell on expert i, a constant, and P_i the mean of its probability, a softmax over the E
    experts (Switch Transformer, arXiv 2101.03961, equations 4 to 6, where a token makes one choice; transformers'
    `load_balancing_loss_func` of one layer is k times as large for k choices). Without n it is 1 where tokens spread
    evenly.

    Where the label may not update a group (its contribution to `mlp_in` is 0), f of its experts is 1 / E, or the mean f
    of the experts that it may update if that is larger: these are pushed up to an even share and evened out among
    themselves, and once they are even nothing draws tokens from them to experts that cannot learn. There is no loss for
    a label that may update none, nor for one of which no more experts are active than a token chooses: its shares are
    fixed.

    logits   [B, S, experts]; `route` of the tables multiplies what flows back to those of a group
    chosen   what `route` returns for these logits
    counted  bool [B, S]: the tokens that count
    bounds   as in `route`
    """
    for tensor in (logits, chosen, counted):
        plan.check(tensor)
    plan.check_bounds(bounds, logits.shape[-1])
    return _module(backend).balance(logits, chosen, counted, plan, bounds)


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
