"""Attention through public libraries, and the choice among them.

`sdpa`        scaled_dot_product_attention; a window as a band of blocks, documents one call each. On a CPU blocks.py,
              where that pays
`flash_attn`  the package flash-attn (Dao, 2023): windows and documents are arguments of one launch
`flex`        FlexAttention, compiled: windows and documents are blocks that one launch skips

SGTM_ATTENTION names one, which then never falls back to another. By default `sdpa` does whole sequences, and everything
on a CPU or in fp32; windows and documents on CUDA are `flash_attn`'s where it is installed, else `flex`'s.

Masks keep their promises bit for bit only where the backward pass is deterministic. `flash_attn` and `flex` are as they
are called here. `sdpa` is on a CPU, and on CUDA under `torch.use_deterministic_algorithms(True)`, which
`kernels.deterministic` sets: SDPA then leaves cuDNN out and makes its flash and memory-efficient backward passes add
in a fixed order. With `warn_only` it does neither (ATen, sdp_utils.cpp and attention_backward.cu).
"""

from __future__ import annotations

from functools import cache, lru_cache, partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sgtm_kernels.attention import blocks
from sgtm_kernels.attention.visible import Visible
from sgtm_kernels.dispatch import algorithm

HALF = (torch.float16, torch.bfloat16)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, visible: Visible) -> torch.Tensor:
    """q [B, heads, S, d], k and v [B, kv_heads, S, d] -> [B, S, heads * d].

    Raises ValueError where SGTM_ATTENTION names what is unknown, or cannot do it here.
    """
    chosen = choose(facts_of(q.device, q.dtype, q.shape[3]), visible.whole)
    if not q.shape[1]:  # a group without heads: SDPA of torch 2.11 divides by zero on a CPU, which ends the process
        return q.transpose(1, 2).flatten(2)
    return LIBRARIES[chosen](q, k, v, scale, visible)


class Facts(NamedTuple):
    """What decides: the heads, the device, and why a library cannot be used on it (None: it can)."""

    device: str
    dtype: torch.dtype
    head_dim: int
    flash_attn: str | None = None
    flex: str | None = None


@lru_cache(maxsize=64)
def facts_of(device: torch.device, dtype: torch.dtype, head_dim: int) -> Facts:
    if device.type != "cuda":
        return Facts(device.type, dtype, head_dim)
    old = None
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        old = "the device is older than Ampere (compute capability 8.0)"
    return Facts(device.type, dtype, head_dim, old or _flash_attn_problem(), old or _flex_problem())


def choose(facts: Facts, whole: bool) -> str:
    """One of LIBRARIES. whole: neither windows nor documents."""
    if chosen := algorithm("SGTM_ATTENTION"):
        if problem := obstacle(chosen, facts):
            raise ValueError(f"SGTM_ATTENTION={chosen} was requested, but {problem}")
        return chosen
    if whole or facts.dtype not in HALF:
        return "sdpa"
    return next(library for library in ("flash_attn", "flex", "sdpa") if not obstacle(library, facts))


def obstacle(library: str, facts: Facts) -> str | None:
    """Why this library cannot compute attention here, or None."""
    if library == "sdpa":
        return None
    if facts.device != "cuda":
        return f"it trains on CUDA alone, and these tensors are on the device {facts.device!r}"
    if library == "flash_attn":
        if facts.dtype not in HALF:
            return f"it takes fp16 and bf16, not {facts.dtype}"
        if facts.head_dim > 256:
            return f"it takes heads of up to 256, not {facts.head_dim}"
        return facts.flash_attn
    if facts.dtype not in (*HALF, torch.float32):
        return f"it takes fp16, bf16 and fp32, not {facts.dtype}"
    if facts.head_dim < 16:
        return f"it takes heads of 16 and more, not {facts.head_dim}"
    return facts.flex


@cache
def _flash_attn_problem() -> str | None:
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func  # noqa: F401
    except Exception as error:  # built for another torch it can raise anything
        return f"flash_attn does not import ({error}); pip install flash-attn"
    return None


def _flex_problem() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if torch.version.hip:
        return "its backward pass is not deterministic on ROCm"  # pytorch/torchtitan issue 3960
    return None


def by_flash_attn(q, k, v, scale: float, visible: Visible) -> torch.Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    window = (-1, -1) if visible.window is None else (visible.window - 1, 0)
    # Else its backward pass adds dQ up in an order that differs from run to run.
    masks = {"softmax_scale": scale, "causal": True, "window_size": window, "deterministic": True}
    if visible.documents is None:
        return flash_attn_func(q, k, v, **masks).flatten(2)
    edges, longest = visible.edges(q.device)
    tokens = (x.flatten(0, 1) for x in (q, k, v))
    return flash_attn_varlen_func(*tokens, edges, edges, longest, longest, **masks).view(*q.shape[:2], -1)


def by_flex(q, k, v, scale: float, visible: Visible) -> torch.Tensor:
    from sgtm_kernels.attention import flex  # imports torch's compiler, which only this needs

    return flex.attend(q, k, v, scale, visible)


def by_sdpa(q, k, v, scale: float, visible: Visible) -> torch.Tensor:
    if visible.documents is None:
        return _causal(q, k, v, scale, visible.window)
    parts, seq_len = [], q.shape[2]
    for start, end in visible.documents:
        row, s = divmod(start, seq_len)
        index = (slice(row, row + 1), slice(None), slice(s, s + end - start))
        parts.append(_causal(q[index], k[index], v[index], scale, visible.window)[0])
    return torch.cat(parts).view(q.shape[0], seq_len, -1)


def _causal(q, k, v, scale: float, window: int | None) -> torch.Tensor:
    """Causal attention of every sequence, [B, S, heads * d]."""
    if blocks.pays(q, q.shape[3]):
        return blocks.attend(q, k, v, scale, window)
    sdpa = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    if window is None or window >= q.shape[2]:
        return sdpa(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    # A block of `window` queries sees keys of its own block and of the one before: a band of the square.
    q, k, v = (x.split(window, dim=2) for x in (q, k, v))
    parts = [sdpa(q[0], k[0], v[0], is_causal=True)]
    for i in range(1, len(q)):
        keys, values = torch.cat(k[i - 1 : i + 1], dim=2), torch.cat(v[i - 1 : i + 1], dim=2)
        parts.append(sdpa(q[i], keys, values, attn_mask=_band(q[i].shape[2], window, q[i].dtype, q[i].device)))
    return torch.cat(parts, dim=2).transpose(1, 2).flatten(2)


@lru_cache(maxsize=32)
def _band(queries: int, window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[queries, window + queries] additive mask: query t is key window + t and sees the `window` keys up to itself."""
    position = torch.arange(window + queries, device=device)
    distance = position[window:, None] - position
    return torch.zeros(distance.shape, dtype=dtype, device=device).masked_fill_(
        (distance < 0) | (distance >= window), -torch.inf
    )


LIBRARIES = {"sdpa": by_sdpa, "flash_attn": by_flash_attn, "flex": by_flex}
