"""Masked table lookup on slices: only the tokens that may update the table are scattered."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sgtm_kernels.autograd import eager
from sgtm_kernels.plan import MAX_SLICES, MaskPlan


def embedding(ids, weight, plan: MaskPlan, kind: str):
    return _lookup(ids, weight, plan, plan.joint(kind))


def _forward(ids, weight, plan, tokens):
    return F.embedding(ids, weight)


def _keep(inputs, output):
    ids, weight, plan, tokens = inputs
    return (ids,), plan, (tokens, weight.shape[0], weight.dtype)


def _backward(dy, ids, plan, tokens, rows, dtype, wanted):
    (by_label, slices), ids, dy = tokens, ids.flatten(), dy.flatten(0, 1)
    # A frequent token is a long sum: it is accumulated in fp32, whatever the dtype of the table.
    dy = dy.to(torch.promote_types(dy.dtype, torch.float32))
    if len(slices) > MAX_SLICES:
        dw = _scatter(dy * plan.token_weights(by_label, dy)[:, None], ids, rows)
    elif not slices:
        dw = dy.new_zeros(rows, dy.shape[1])
    elif plan.plain(tokens):
        dw = _scatter(dy, ids, rows)
    else:
        parts = [dy[s:e] if weight == 1 else dy[s:e] * weight for s, e, weight in slices]
        chosen = [ids[s:e] for s, e, _ in slices]
        dw = _scatter(torch.cat(parts), torch.cat(chosen), rows)
    return None, dw.to(dtype)


_lookup = eager(_forward, _keep, _backward)


def _scatter(dy: torch.Tensor, ids: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.ops.aten.embedding_dense_backward(dy, ids, rows, -1, False)
