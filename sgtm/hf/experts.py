"""Experts of Hugging Face, both ways: which architecture, and the weights of the experts one by one.

A model without shared experts is a Mixtral one. With them it is a Qwen2-MoE one, whose shared expert has a gate,
sigmoid(g x): with g = 0 that is a half, and the output projection is doubled, so that nothing is rounded. Folders have
a tensor for each expert and matrix, which transformers 4 and 5 both read; a model of transformers 5 holds them fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, PretrainedConfig, Qwen2MoeConfig

from sgtm.config.schema import ModelConfig
from sgtm.hf.names import SHARED_GATE, Weight
from sgtm.hf.units import Units

GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"
MATRICES = {"mixtral": ("w1", "w3", "w2"), "qwen2_moe": ("gate_proj", "up_proj", "down_proj")}


def experts_config(config: ModelConfig, experts: int, common: Mapping[str, Any]) -> PretrainedConfig:
    """`common`: what it shares with Llama's. Raises ValueError for heads that Qwen2-MoE does not take."""
    if not config.shared_experts:
        return MixtralConfig(
            num_local_experts=experts, num_experts_per_tok=config.experts_per_token, sliding_window=None, **common
        )
    if config.heads * config.size_per_head != config.hidden_size:
        raise ValueError(
            f"model.shared_experts {config.shared_experts}: such a model is exported as Qwen2-MoE, whose heads are "
            f"hidden_size / heads wide, but {config.heads} heads of {config.size_per_head} are not hidden_size "
            f"{config.hidden_size}; train without shared experts, or with model.head_dim null"
        )
    return Qwen2MoeConfig(
        num_experts=experts,
        num_experts_per_tok=config.experts_per_token,
        moe_intermediate_size=config.intermediate_size,
        shared_expert_intermediate_size=config.shared_experts * config.intermediate_size,
        norm_topk_prob=True,
        qkv_bias=False,
        **{key: value for key, value in common.items() if key != "head_dim"},
    )


def experts_shape(config: PretrainedConfig, require: Callable[[str, bool, str], None]) -> dict[str, Any]:
    """Keys of `ModelConfig` that a Mixtral or Qwen2-MoE config has beside those of Llama.

    require  (key, satisfied, what would be right): raises where it is not
    """
    if isinstance(config, MixtralConfig):
        return {"experts": config.num_local_experts, "experts_per_token": config.num_experts_per_tok}
    size, together = config.moe_intermediate_size, config.shared_expert_intermediate_size
    require("norm_topk_prob", config.norm_topk_prob, "true")
    require("decoder_sparse_step", config.decoder_sparse_step == 1, "1")
    require("mlp_only_layers", not config.mlp_only_layers, "[]")
    require("qkv_bias", not config.qkv_bias, "false")
    require("shared_expert_intermediate_size", together % size == 0, f"a multiple of moe_intermediate_size {size}")
    return {
        "experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "shared_experts": together // size,
        "intermediate_size": size,
    }


def expert_tensors(
    tensor: Tensor, weight: Weight, units: Units, shared: int, factors: Sequence[float], drop: bool
) -> Iterator[tuple[str, Tensor]]:
    """(name inside the block, tensor) of our `w_in` or `w_out`; the arguments as those of `Units.to_original`."""
    size = len(tensor) // (shared + len(units.order))
    own = replace(units, rows_each=size).to_original(tensor[shared * size :], factors, drop)
    for number, expert in enumerate(own.split(size)):
        for name, part in zip(weight.theirs, expert.chunk(len(weight.theirs)), strict=True):
            yield name.format(number), part.t().contiguous() if weight.transposed else part.clone()
    if shared:
        always = tensor[: shared * size].unflatten(0, (shared, len(weight.shared), -1))
        for name, part in zip(weight.shared, always.unbind(1), strict=True):
            part = part.flatten(0, 1)
            yield name, part.t() * 2 if weight.transposed else part.clone()


def shared_gate(router: Tensor) -> Tensor:
    """The gate of a shared expert, of 0 [1, D], beside a router [experts, D]."""
    return torch.zeros_like(router[:1])


def check_shared_gate(gate: Tensor) -> None:
    """Raises ValueError for one that depends on the token."""
    if gate.any():
        raise ValueError(
            f"{SHARED_GATE} is not 0: only a shared expert whose gate is the same for all tokens can be imported"
        )


def of_experts(take: Callable[[str], Tensor], block: str, weight: Weight, units: Units, shared: int) -> Tensor:
    """Our `w_in` or `w_out`; take: the tensor of a name, which begins with `block`."""
    parts = [take(block + name.format(number)) for number in range(len(units.order)) for name in weight.theirs]
    together = torch.cat([part.t() if weight.transposed else part for part in parts])
    rows = replace(units, rows_each=len(together) // len(units.order)).to_groups(together)
    if not shared:
        return rows
    always = [take(block + name) for name in weight.shared]
    always = [part.t() / 2 for part in always] if weight.transposed else always
    return torch.cat((torch.stack([part.unflatten(0, (shared, -1)) for part in always], 1).flatten(0, 2), rows))


def unfused(state: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """State of a model, with the names and tensors that its folder has; of other model types as it is."""
    if model_type not in MATRICES:
        return dict(state)
    apart: dict[str, Tensor] = {}
    gate, up, down = MATRICES[model_type]
    for name, tensor in state.items():
        folder = name.replace(".mlp.", ".block_sparse_moe.") if model_type == "mixtral" else name
        if name.endswith(GATE_UP):
            for number, expert in enumerate(tensor.unbind()):
                for matrix, part in zip((gate, up), expert.chunk(2), strict=True):
                    apart[f"{folder.removesuffix('.gate_up_proj')}.{number}.{matrix}.weight"] = part
        elif name.endswith(DOWN):
            for number, expert in enumerate(tensor.unbind()):
                apart[f"{folder.removesuffix('.down_proj')}.{number}.{down}.weight"] = expert
        else:
            apart[folder] = tensor
    return apart
