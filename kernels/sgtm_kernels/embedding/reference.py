"""Masked table lookup through autograd."""

from __future__ import annotations

import torch.nn.functional as F

from sgtm_kernels.linear.reference import update_only
from sgtm_kernels.plan import MaskPlan


def embedding(ids, weight, plan: MaskPlan, kind: str):
    looked_up = F.embedding(ids, weight)
    return looked_up.detach() + update_only(looked_up, plan.token_weights(plan.tables.update_joint[kind], weight))
