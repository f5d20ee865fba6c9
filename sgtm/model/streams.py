"""The residual stream after the blocks of a model, as its forward passes compute it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from sgtm.model.transformer import Transformer


@contextmanager
def residual_streams(model: Transformer, layers: Sequence[int] | None = None) -> Iterator[list[torch.Tensor]]:
    """A list to which every forward pass adds the stream [B, S, D] after each of these blocks, in their order.

    layers  counted from 0; None: all
    """
    streams: list[torch.Tensor] = []
    blocks = [model.blocks[layer] for layer in (range(len(model.blocks)) if layers is None else layers)]
    hooks = [block.register_forward_hook(lambda _, inputs, x: streams.append(x)) for block in blocks]
    try:
        yield streams
    finally:
        for hook in hooks:
            hook.remove()
