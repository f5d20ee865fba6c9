"""Experts of Hugging Face, both ways: which architecture, and the weights of the experts.

A model without shared experts is a Mixtral one, with them a Granite MoE one (`granitemoeshared`) whose multipliers are
1, but for that of attention, which is the usual scale. Qwen2-MoE has a gate on its shared expert, which could be a
constant, but llama.cpp divides 0 by 0 at a gate of 0, and vLLM makes up the biases that such a folder lacks.

Folders of Mixtral have a tensor for each expert and matrix, those of Granite MoE one for all experts, as transformers 4
and 5 both read them; a model of transformers 5 has other names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GraniteMoeSharedConfig, MixtralConfig, PretrainedConfig

from sgtm.config.schema import ModelConfig
from sgtm.hf.names import Weight
from sgtm.hf.units import Units

GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"
FUSED = {GATE_UP: ".input_linear.weight", DOWN: ".output_linear.weight", ".router.weight": ".router.layer.weight"}
"""Ends of names of Granite MoE in a model of transformers 5, and in a folder."""


def experts_config(config: ModelConfig, experts: int, common: Mapping[str, Any]) -> PretrainedConfig:
    """`common`: what it shares with Llama's. Raises ValueError for heads that Granite MoE does not take."""
    counts: dict[str, Any] = {"num_local_experts": experts, "num_experts_per_tok": config.experts_per_token}
    if not config.shared_experts:
        return MixtralConfig(sliding_window=None, **counts, **common)
    if config.heads * config.size_per_head != config.hidden_size:
        raise ValueError(
            f"model.shared_experts {config.shared_experts}: such a model is exported as Granite MoE, whose heads are "
            f"hidden_size / heads wide, but {config.heads} heads of {config.size_per_head} are not hidden_size "
            f"{config.hidden_size}; train without shared experts, or with model.head_dim null"
        )
    return GraniteMoeSharedConfig(
        shared_intermediate_size=config.shared_experts * config.intermediate_size,
        attention_multiplier=config.size_per_head**-0.5,
        **counts,
        **{key: value for key, value in common.items() if key != "head_dim"},
    )


def experts_shape(config: PretrainedConfig, require: Callable[[str, bool, str], None]) -> dict[str, Any]:
    """Keys of `ModelConfig` that a Mixtral or Granite MoE config has beside those of Llama.

    require  (key, satisfied, what would be right): raises where it is not
    """
    counts = {"experts": config.num_local_experts, "experts_per_token": config.num_experts_per_tok}
    if isinstance(config, MixtralConfig):
        return counts
    for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        require(key, getattr(config, key) == 1, "1")
    scale = (config.hidden_size // config.num_attention_heads) ** -0.5
    require("attention_multiplier", math.isclose(config.attention_multiplier, scale), f"{scale:g}")
    size, together = config.intermediate_size, config.shared_intermediate_size
    require(
        "shared_intermediate_size", together > 0 and together % size == 0, f"a multiple of intermediate_size {size}"
    )
    return {**counts, "shared_experts": together // size}


def experts_to_hf(
    tensor: Tensor, weight: Weight, units: Units, shared: int, factors: Sequence[float], drop: bool
) -> Iterator[tuple[str, Tensor]]:
    """(name inside the block, tensor) of our `w_in` or `w_out`; the arguments as those of `Units.to_original`."""
    size = len(tensor) // (shared + len(units.order))
    rows = replace(units, rows_each=size).to_original(tensor[shared * size :], factors, drop)
    if weight.each_expert:
        for number, expert in enumerate(rows.split(size)):
            for name, part in zip(weight.theirs, expert.chunk(len(weight.theirs)), strict=True):
                yield name.format(number), part.t().contiguous() if weight.transposed else part.clone()
        return
    stacked, always = rows.unflatten(0, (-1, size)), tensor[: shared * size]
    if weight.transposed:
        stacked, always = stacked.transpose(1, 2), always.t()
    else:  # the gates of all shared experts, and their ups
        always = always.unflatten(0, (shared, 2, -1)).transpose(0, 1).flatten(0, 2)
    yield weight.theirs[0], stacked.contiguous()
    yield weight.shared, always.clone(memory_format=torch.contiguous_format)


def experts_from_hf(take: Callable[[str], Tensor], block: str, weight: Weight, units: Units, shared: int) -> Tensor:
    """Our `w_in` or `w_out`; take: the tensor of a name, which begins with `block`."""
    if weight.each_expert:
        parts = [take(block + name.format(number)) for number in range(len(units.order)) for name in weight.theirs]
        rows = torch.cat([part.t() if weight.transposed else part for part in parts])
    else:
        stacked = take(block + weight.theirs[0])
        rows = (stacked.transpose(1, 2) if weight.transposed else stacked).flatten(0, 1)
    grouped = replace(units, rows_each=len(rows) // len(units.order)).to_groups(rows)
    if not weight.shared:
        return grouped
    always = take(block + weight.shared)
    if weight.transposed:
        always = always.t()
    else:
        always = always.unflatten(0, (2, shared, -1)).transpose(0, 1).flatten(0, 2)
    return torch.cat((always, grouped))


def folder_state(state: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """State of a model, with the names and tensors that its folder has; of other model types as it is."""
    if model_type == "granitemoeshared":
        return {_in_folder(name): tensor for name, tensor in state.items()}
    if model_type != "mixtral":
        return dict(state)
    apart: dict[str, Tensor] = {}
    for name, tensor in state.items():
        folder = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith(GATE_UP):
            for number, expert in enumerate(tensor.unbind()):
                for matrix, part in zip(("w1", "w3"), expert.chunk(2), strict=True):
                    apart[f"{folder.removesuffix('.gate_up_proj')}.{number}.{matrix}.weight"] = part
        elif name.endswith(DOWN):
            for number, expert in enumerate(tensor.unbind()):
                apart[f"{folder.removesuffix('.down_proj')}.{number}.w2.weight"] = expert
        else:
            apart[folder] = tensor
    return apart


def _in_folder(name: str) -> str:
    """Of Granite MoE."""
    for end, folder in FUSED.items():
        if name.endswith(f".block_sparse_moe{end}"):
            return name.removesuffix(end) + folder
    return name
