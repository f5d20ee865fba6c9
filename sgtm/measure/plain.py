"""An ordinary GPT-Neo or Llama in plain PyTorch, nothing masked: what our unmasked step is compared with.

The same function as sgtm/model/transformer.py (tests/unit/test_plain.py: loss and gradients on the same weights),
written as one writes it for `torch.compile`: fused projections, SDPA, F.cross_entropy. A layer with a local window
attends block by block to its own block of keys and the one before, under a mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sgtm.masking.shape import ModelShape


def norm(shape: ModelShape) -> nn.Module:
    layer = nn.LayerNorm if shape.family == "gpt_neo" else nn.RMSNorm
    return layer(shape.hidden_size, eps=shape.norm_eps)


class PlainAttention(nn.Module):
    band: torch.Tensor  # only with a window

    def __init__(self, shape: ModelShape, window: int | None):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.num_kv_heads, shape.size_per_head
        neo, inside = shape.family == "gpt_neo", self.heads * self.head_dim
        self.qkv = nn.Linear(shape.hidden_size, inside + 2 * self.kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(inside, shape.hidden_size, bias=neo)
        self.scale = 1.0 if neo else self.head_dim**-0.5
        self.window = window if window is None or window < shape.context else None
        if self.window is not None:
            self.register_buffer("band", band(shape.context, self.window), persistent=False)

    def forward(self, x: torch.Tensor, rotary) -> torch.Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if self.window is not None:
            y = self._in_blocks(q, k, v)
        else:
            gqa = self.kv_heads < self.heads
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=gqa)
        return self.out(y.transpose(1, 2).flatten(2))

    def _in_blocks(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, blocks = q.shape[0], len(self.band)
        q, k, v = (x.unflatten(2, (blocks, self.window)).transpose(1, 2) for x in (q, k, v))
        k, v = (torch.cat((F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x), dim=3).flatten(0, 1) for x in (k, v))
        mask = self.band.repeat(batch, 1, 1, 1)
        y = F.scaled_dot_product_attention(q.flatten(0, 1), k, v, attn_mask=mask, scale=self.scale)
        return y.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)


def band(seq_len: int, window: int) -> torch.Tensor:
    """bool [blocks, 1, window, 2 window]: which keys of its block and of the one before a query sees."""
    if seq_len % window:
        raise ValueError(f"context {seq_len} is not a multiple of window {window}")
    keys = torch.arange(2 * window)
    distance = keys[window:, None] - keys
    sees = ((distance >= 0) & (distance < window)).repeat(seq_len // window, 1, 1, 1)
    sees[0, ..., :window] = False
    return sees


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary position embedding of x [B, heads, S, head_dim] by cos and sin [S, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * rotary[0] + torch.cat((-second, first), dim=-1) * rotary[1]


class PlainMLP(nn.Module):
    def __init__(self, shape: ModelShape):
        super().__init__()
        self.gated = shape.family == "llama"
        rows = shape.intermediate_size * (1 + self.gated)  # gates before ups
        self.up = nn.Linear(shape.hidden_size, rows, bias=not self.gated)
        self.down = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=not self.gated)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.gated:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class PlainBlock(nn.Module):
    def __init__(self, shape: ModelShape, index: int):
        super().__init__()
        self.attention_norm, self.mlp_norm = norm(shape), norm(shape)
        self.attention, self.mlp = PlainAttention(shape, shape.window_of(index)), PlainMLP(shape)

    def forward(self, x: torch.Tensor, rotary) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.mlp(self.mlp_norm(x))


class Plain(nn.Module):
    """Sequences have the length of the shape's context. Raises ValueError for a head bias, which no preset has, and for
    experts."""

    cos: torch.Tensor  # of Llama's positions, as `sin`
    sin: torch.Tensor

    def __init__(self, shape: ModelShape):
        super().__init__()
        if shape.head_bias:
            raise ValueError("the plain model has no bias of the head: head_bias true")
        if shape.experts:
            raise ValueError(f"the plain model has no experts: family {shape.family}")
        neo = shape.family == "gpt_neo"
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.position = nn.Embedding(shape.context, shape.hidden_size) if neo else None
        self.blocks = nn.ModuleList(PlainBlock(shape, i) for i in range(shape.layers))
        self.final_norm = norm(shape)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        if shape.tie_embeddings:
            self.head.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=shape.init_std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if not neo:
            half = torch.arange(0, shape.size_per_head, 2, dtype=torch.float32) / shape.size_per_head
            angles = (torch.arange(shape.context)[:, None] * shape.rope_theta**-half).repeat(1, 2)
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, input_ids: torch.Tensor, targets: torch.Tensor, scale: float) -> torch.Tensor:
        """`scale` times the sum of the token losses, fp32; input_ids and targets int64 [B, context]."""
        x = self.embedding(input_ids)
        rotary = None if self.position is not None else (self.cos, self.sin)
        if self.position is not None:
            x = x + self.position.weight
        for block in self.blocks:
            x = block(x, rotary)
        logits = self.head(self.final_norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum") * scale
