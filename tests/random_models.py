"""Models whose weights are far from where a new one begins, so that groups, biases and norms matter."""

from __future__ import annotations

import torch

from sgtm.config import Config
from sgtm.model.transformer import Transformer


@torch.no_grad()
def moved_model(config: Config, by: float) -> Transformer:
    """A model of the `torch` backend, each weight moved at random with standard deviation `by`; always the same one."""
    torch.manual_seed(0)
    model = Transformer(config.model, config.partition, "torch")
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * by)
    return model
