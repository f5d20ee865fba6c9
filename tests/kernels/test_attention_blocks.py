"""Attention of small heads on a CPU, by blocks of queries (attention/blocks.py), and of large ones, which is SDPA's."""

import pytest
import torch
import torch.nn.functional as F

from sgtm_kernels.attention import HeadLayout, attention, blocks
from sgtm_kernels.testing import (
    LAYOUTS,
    assert_accurate,
    assert_same_bits,
    forward_backward,
    random_like,
    random_plan,
    random_tables,
)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "seq_len", "window", "scale", "buffer"),
    [
        (1, 1, 300, 70, 1.0, blocks.BUFFER),  # blocks of 128
        (33, 33, 200, 70, 0.7, blocks.BUFFER),
        (16, 4, 130, None, 0.7, blocks.BUFFER),
        (8, 8, 64, 9, 3.3, blocks.BUFFER),  # scores of 30, as GPT-Neo's unscaled ones can be
        (8, 4, 512, None, 0.7, 2**14),  # less room than for 16 queries: 32 blocks of 16, their sums in fp32
    ],
)
def test_blocks_of_queries_are_as_accurate_as_torch(heads, kv_heads, seq_len, window, scale, buffer, monkeypatch):
    monkeypatch.setattr(blocks, "BUFFER", buffer)
    shapes = [(2, n, seq_len, 8) for n in (heads, kv_heads, kv_heads)]
    inputs = [random_like(torch.empty(shape, dtype=torch.bfloat16), i) for i, shape in enumerate(shapes)]
    distance = torch.arange(seq_len)[:, None] - torch.arange(seq_len)
    seen = (distance >= 0) & (distance < (window or seq_len))

    def plain(q, k, v):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    assert blocks.pays(inputs[0], inputs[0].shape[3])
    ours = forward_backward(lambda q, k, v: blocks.attend(q, k, v, scale, window), *inputs)
    theirs = forward_backward(plain, *inputs)
    exact = forward_backward(plain, *(x.double() for x in inputs))
    for name, mine, torchs, right in zip(("y", "dq", "dk", "dv"), ours, theirs, exact, strict=True):
        assert_accurate(mine, torchs, right, name=name)
        error, budget = ((x.double() - right).square().mean().sqrt() for x in (mine, torchs))
        assert error <= 1.5 * budget, f"{name}: {error:.2e}, torch's own {budget:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_heads_are_torchs_own_attention(layout, dtype):
    """Nothing masked, bit for bit: blocks do not pay there."""
    heads = HeadLayout((4, 2, 6), (2, 1, 3), 24)
    plan = random_plan(11, random_tables(12, (1.0,)), layout, 10, 13)

    def plain(qkv):
        outputs = []
        for q, k, v in heads.split(qkv):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7, enable_gqa=True)
            outputs.append(out.transpose(1, 2).flatten(2))
        return torch.cat(outputs, -1)

    def ours(qkv):
        return attention(qkv, heads, plan, scale=0.7, window=None, rotary=None, backend="torch")

    x = random_like(torch.empty(10, 13, 24 * (12 + 2 * 6), dtype=torch.bfloat16), 1).to(dtype)
    for mine, theirs in zip(forward_backward(ours, x), forward_backward(plain, x), strict=True):
        assert_same_bits(mine, theirs)
