"""Masked table lookup on slices: only the tokens that may update the table are scattered."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sgtm_kernels.plan import MAX_SLICES, MaskPlan


def embedding(ids, weight, plan: MaskPlan, kind: str):
    return _Embedding.apply(ids, weight, plan, plan.joint(kind))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, plan, tokens):
        ctx.save_for_backward(ids)
        ctx.plan, ctx.tokens, ctx.rows, ctx.dtype = plan, tokens, weight.shape[0], weight.dtype
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, dy):
        (ids,) = ctx.saved_tensors
        (by_label, slices), ids, dy = ctx.tokens, ids.flatten(), dy.flatten(0, 1)
        # A frequent token is a long sum: it is accumulated in fp32, whatever the dtype of the table.
        dy = dy.to(torch.promote_types(dy.dtype, torch.float32))
        if len(slices) > MAX_SLICES:
            dw = _scatter(dy * ctx.plan.token_weights(by_label, dy)[:, None], ids, ctx.rows)
        elif not slices:
            dw = dy.new_zeros(ctx.rows, dy.shape[1])
        else:
            parts = [dy[s:e] if weight == 1 else dy[s:e] * weight for s, e, weight in slices]
            chosen = [ids[s:e] for s, e, _ in slices]
            dw = _scatter(torch.cat(parts), torch.cat(chosen), ctx.rows)
        return None, dw.to(ctx.dtype), None, None


def _scatter(dy: torch.Tensor, ids: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.ops.aten.embedding_dense_backward(dy, ids, rows, -1, False)
