"""Masked table lookup, for token embeddings (tied ones too) and learned positions.

Promise (tests/kernels/test_embedding.py): a token that may not update the table contributes exactly nothing to its
gradient.
"""

from __future__ import annotations

import torch

from sgtm_kernels.dispatch import pick
from sgtm_kernels.plan import MaskPlan, check_known


def embedding(
    ids: torch.Tensor, weight: torch.Tensor, plan: MaskPlan, kind: str, backend: str = "torch"
) -> torch.Tensor:
    """weight [V, D] looked up at ids int64 [B, S] -> [B, S, D]. `kind` of the table: `embedding` or `position`."""
    check_known("kind of table", kind, ("embedding", "position"))
    plan.check(ids)
    return pick("embedding", backend).embedding(ids, weight, plan, kind)
