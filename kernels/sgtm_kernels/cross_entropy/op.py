"""LM head and cross-entropy in one, over chunks of tokens.

Promises (tests/kernels/test_cross_entropy.py): the fp32 logits never exist for more than a chunk; tokens that may not
update the head contribute exactly nothing to its gradient, while the gradient of the hidden states is the plain one.
"""

from __future__ import annotations

import torch

from sgtm_kernels.dispatch import pick
from sgtm_kernels.plan import MaskPlan


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    plan: MaskPlan,
    scale: float,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of logits x [B, S, D] @ weight [V, D]^T + bias [V] against targets int64 [B, S] (-100: none).

    Returns the loss, `scale` times the sum of the token losses in nats (fp32 scalar; fp64 for fp64 inputs), and the
    sums by applied label, [labels], unscaled and detached.
    """
    if targets.shape != x.shape[:2] or weight.shape[1] != x.shape[2]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, targets))
        raise ValueError(f"hidden states, weight and targets must be [B, S, D], [V, D] and [B, S]; got {shapes}")
    plan.check_product(x, bias, weight.shape[1], weight.shape[0])
    return pick("cross_entropy", backend).linear_cross_entropy(x, weight, bias, targets, plan, scale)
