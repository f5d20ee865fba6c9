"""Attention in a compiled graph: every head of every token, then a factor per token; documents and windows as an op.

Rotary positions, SDPA of whole sequences and the factors are plain torch. What public.py would do in as many calls as
there are documents, or choose another library for, is one op; its backward pass computes the forward pass again.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from sgtm_kernels.attention import blocks
from sgtm_kernels.attention.op import rotate
from sgtm_kernels.attention.public import attend, choose, facts_of
from sgtm_kernels.attention.visible import Visible
from sgtm_kernels.graph import define, scale_groups
from sgtm_kernels.plan import MaskPlan, plan_of
from sgtm_kernels.signature import masked


def attention(qkv, layout, plan: MaskPlan, scale, window, rotary, overwrite=False, below=True):
    window = window if window is not None and window < plan.seq_len else None
    outputs = []
    for q, k, v in layout.split(qkv):
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        outputs.append(_attend(q, k, v, scale, plan, window))
    if len(outputs) > 1 and masked(plan, "outputs"):
        outputs = scale_groups(outputs, plan, qkv)
    return torch.cat(outputs, dim=-1)


def _attend(q, k, v, scale, plan: MaskPlan, window):
    if not q.shape[1]:
        return v.new_zeros(v.shape[0], v.shape[2], 0)
    if window is None and not plan.signature.documents and _is_sdpa(q.device, q.dtype, q.shape[3]):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
        return out.transpose(1, 2).flatten(2)
    return _Attend.apply(q, k, v, plan.handle, scale, window)


@torch.compiler.assume_constant_result
def _is_sdpa(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether public.py hands whole sequences to SDPA."""
    like = torch.empty(0, device=device, dtype=dtype)
    return choose(facts_of(device, dtype, head_dim), whole=True) == "sdpa" and not blocks.pays(like, head_dim)


def _forward(q, k, v, plan, scale, window):
    return attend(q, k, v, scale, Visible(plan_of(plan), window)).contiguous()


def _backward(dy, q, k, v, plan, scale, window):
    with _recording():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = attend(q, k, v, scale, Visible(plan_of(plan), window))
    return tuple(dx.contiguous() for dx in torch.autograd.grad(out, (q, k, v), dy))


@contextmanager
def _recording():
    """Record for autograd inside an op, where the dispatcher may have put that behind it (under a dispatch mode)."""
    keys, excluded = torch._C.DispatchKey, torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


MASKS = "Tensor plan, float scale, int? window"

visible_attention = define(
    f"visible_attention(Tensor q, Tensor k, Tensor v, {MASKS}) -> Tensor",
    _forward,
    lambda q, *_: q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3]),
)

visible_attention_backward = define(
    f"visible_attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, {MASKS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda dy, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, scale, window):
        ctx.save_for_backward(q, k, v, plan)
        ctx.arguments = scale, window
        return visible_attention(q, k, v, plan, scale, window)

    @staticmethod
    def backward(ctx, dy):
        return *visible_attention_backward(dy, *ctx.saved_tensors, *ctx.arguments), None, None, None
