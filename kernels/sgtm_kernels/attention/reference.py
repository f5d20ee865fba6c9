"""Attention with materialised scores in fp32 and an explicit mask."""

from __future__ import annotations

import torch

from sgtm_kernels.attention.op import rotate
from sgtm_kernels.mlp.reference import mask_groups
from sgtm_kernels.plan import MaskPlan


def attention(qkv, layout, plan: MaskPlan, scale, window, rotary, overwrite=False, below=True):
    visible = visible_keys(plan, window, qkv.device)
    outputs = []
    for q, k, v in layout.split(qkv):
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        share = q.shape[1] // k.shape[1] if k.shape[1] else 1
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (q.to(wide) @ k.to(wide).transpose(2, 3)) * scale
        scores = scores.masked_fill(~visible[:, None], float("-inf"))
        out = scores.softmax(-1).to(v.dtype) @ v
        outputs.append(out.transpose(1, 2).flatten(2))
    bounds = tuple(sum(layout.heads[:g]) * layout.head_dim for g in range(len(layout.heads) + 1))
    return mask_groups(torch.cat(outputs, dim=-1), plan, bounds)


def visible_keys(plan: MaskPlan, window: int | None, device) -> torch.Tensor:
    """bool [B, S, S]: which keys (last axis) a query sees."""
    position = torch.arange(plan.seq_len, device=device)
    distance = position[:, None] - position[None, :]
    visible = (distance >= 0) & (distance < (window or plan.seq_len))
    document = torch.zeros(plan.tokens, dtype=torch.long, device=device)
    for i, (start, end) in enumerate(plan.documents or ()):
        document[start:end] = i
    document = document.view(plan.batch, plan.seq_len)
    return visible & (document[:, :, None] == document[:, None, :])
