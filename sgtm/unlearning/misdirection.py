"""Representation misdirection (RMU; Li et al. 2024, arXiv 2403.03218, section 4).

Hidden states of forget text after one layer l are steered to a random direction, those of retain text held:

    mean over forget of |h - c u|^2 / D   +   alpha * mean over retain of |h - h_ref|^2 / D

h, h_ref: residual stream [D] after layer l of the model and of the reference, at every position that has a target; u:
a unit vector whose elements are uniform in [0, 1) before it is normalised; c: coefficient. Only output matrices of the
MLPs of layers l - 2, l - 1 and l learn, as in the authors' code; by the paper, gradients of these layers suffice.

Values of the paper for Zephyr-7B: l = 7 of 32 layers, c = 6.5, alpha = 1200, rate 5e-5, 150 batches of 4. The layer
here is at the same share of the depth. Its rate is a sixth of the peak of Llama-2 7B, as Mistral's is not public. c is
a norm: compare it with that of the run's residual stream (`norms` in metrics.jsonl), which differs between models.
"""

from __future__ import annotations

import torch

from sgtm.model.streams import residual_streams
from sgtm.model.transformer import Transformer
from sgtm.unlearning.text import Loss, Text

LAYER, OF_LAYERS, BELOW = 7, 32, 2


def rmu(
    model: Transformer,
    reference: Transformer,
    forget: Text,
    retain: Text,
    *,
    layer: int | None = None,
    coefficient: float = 6.5,
    alpha: float = 1200.0,
    seed: int = 0,
) -> Loss:
    """layer: counted from 0; None: at the paper's share of the depth. seed: of the direction.

    Raises ValueError for a layer that the model lacks.
    """
    layer = layer_of(len(model.blocks), layer)
    states = hidden_after(model, forget, layer)
    target = coefficient * direction(states.shape[-1], seed).to(states)
    steering = (states - target).square().mean()
    with torch.no_grad():
        before = hidden_after(reference, retain, layer)
    drift = (hidden_after(model, retain, layer) - before).square().mean()
    return Loss(steering + alpha * drift, {"distance/forget": steering.detach(), "distance/retain": drift.detach()})


def layer_of(count: int, layer: int | None) -> int:
    """The layer to steer in a model of `count` layers. Raises ValueError for one that it lacks."""
    if layer is None:
        return count * LAYER // OF_LAYERS
    if not 0 <= layer < count:
        raise ValueError(f"rmu: no layer {layer}: the model has {count}, counted from 0")
    return layer


def steered(model: Transformer, options: dict) -> set[str]:
    """Names of the parameters that RMU changes. Raises ValueError for a layer that the model lacks."""
    layer = layer_of(len(model.blocks), options["layer"])
    return {f"blocks.{i}.mlp.w_out" for i in range(max(0, layer - BELOW), layer + 1)}


def direction(size: int, seed: int) -> torch.Tensor:
    """u, fp32 [size], of norm 1; on the CPU, so that it is the same on every device."""
    u = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return u / u.norm()


def hidden_after(model: Transformer, text: Text, layer: int) -> torch.Tensor:
    """fp32 [targets, D]: residual stream after a layer, at the positions that have a target."""
    with residual_streams(model, [layer]) as states:
        model.last_hidden(text.input_ids, text.plan)
    return states[0][text.chosen].float()
