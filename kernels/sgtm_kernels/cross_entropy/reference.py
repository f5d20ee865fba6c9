"""LM head and cross-entropy through autograd, all logits at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sgtm_kernels.linear.reference import update_only
from sgtm_kernels.plan import MaskPlan


def linear_cross_entropy(x, weight, bias, targets, plan: MaskPlan, scale):
    joint = plan.tables.update_joint
    logits = F.linear(x, weight.detach(), None if bias is None else bias.detach())
    logits = logits + update_only(F.linear(x.detach(), weight), plan.token_weights(joint["head"], x))
    if bias is not None:
        logits = logits + update_only(bias.expand_as(logits), plan.token_weights(joint["head_bias"], x))
    wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide, targets.flatten(), reduction="none")
    return scale * losses.sum(), label_sums(losses.detach(), plan)


def kept_losses(plan: MaskPlan, keep: bool = False) -> list[torch.Tensor] | None:
    """The token losses [tokens], detached, of every call of the op with this plan; None unless `keep` was set first."""
    return plan.cached("kept losses", list if keep else lambda: None)


def label_sums(losses: torch.Tensor, plan: MaskPlan) -> torch.Tensor:
    """Sum of token losses [tokens] for each label: [labels]; keeps the losses where they are wanted (`kept_losses`)."""
    if (record := kept_losses(plan)) is not None:
        record.append(losses)

    def one_hot() -> torch.Tensor:
        each = torch.arange(len(plan.tables.labels), device=losses.device)
        return (plan.labels(losses.device) == each[:, None]).to(losses.dtype)

    return plan.cached(("one hot", losses.dtype, losses.device), one_hot) @ losses
