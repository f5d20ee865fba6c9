"""Names of the modules of a Hugging Face causal LM, by family, and what `apply_sgtm` masks of a model.

Families differ in names and layout alone: `nn.Linear` stores [out, in] and `Conv1D` (GPT-2) [in, out]; GPT-2 fuses q, k
and v as `q | k | v`, GPT-NeoX head by head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from sgtm.config.sections import MaskingConfig
from sgtm.integrations import roles
from sgtm.integrations.roles import Family, Masked, Role
from sgtm.masking.labels import LabelSpace
from sgtm.masking.partition import Partition


def _llama(*extra: Role) -> Family:
    return Family(
        "model.layers",
        (
            Role("input_layernorm", "norm"),
            Role("self_attn.q_proj", "attn_in", "heads"),
            Role("self_attn.k_proj", "attn_in", "kv_heads"),
            Role("self_attn.v_proj", "attn_in", "kv_heads"),
            *extra,
            Role("self_attn.o_proj", "attn_out", "heads"),
            Role("post_attention_layernorm", "norm"),
            Role("mlp.gate_proj", "mlp_in", "neurons"),
            Role("mlp.up_proj", "mlp_in", "neurons"),
            Role("mlp.down_proj", "mlp_out", "neurons"),
        ),
        (Role("model.norm", "final_norm"),),
    )


def _gpt(*attention: Role) -> Family:
    return Family(
        "transformer.h",
        (
            Role("ln_1", "norm"),
            *attention,
            Role("ln_2", "norm"),
            Role("mlp.c_fc", "mlp_in", "neurons"),
            Role("mlp.c_proj", "mlp_out", "neurons"),
        ),
        (Role("transformer.wpe", "position"), Role("transformer.ln_f", "final_norm")),
    )


FAMILIES = {
    "llama": _llama(),
    "mistral": _llama(),
    "qwen2": _llama(),
    "qwen3": _llama(Role("self_attn.q_norm", "norm"), Role("self_attn.k_norm", "norm")),
    "gpt2": _gpt(Role("attn.c_attn", "attn_in", "heads", parts=3), Role("attn.c_proj", "attn_out", "heads")),
    "gpt_neo": _gpt(
        Role("attn.attention.q_proj", "attn_in", "heads"),
        Role("attn.attention.k_proj", "attn_in", "heads"),
        Role("attn.attention.v_proj", "attn_in", "heads"),
        Role("attn.attention.out_proj", "attn_out", "heads"),
    ),
    "gpt_neox": Family(
        "gpt_neox.layers",
        (
            Role("input_layernorm", "norm"),
            Role("attention.query_key_value", "attn_in", "heads", share=3),
            Role("attention.dense", "attn_out", "heads"),
            Role("post_attention_layernorm", "norm"),
            Role("mlp.dense_h_to_4h", "mlp_in", "neurons"),
            Role("mlp.dense_4h_to_h", "mlp_out", "neurons"),
        ),
        (Role("gpt_neox.final_layer_norm", "final_norm"),),
    ),
}


def family_of(model: nn.Module) -> Family:
    """Raises ValueError for what is no causal LM of a known architecture."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model, PreTrainedModel) or kind not in FAMILIES or model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} (model_type {kind!r}) cannot be masked; pass the causal LM of one of "
            f"{', '.join(FAMILIES)}, without wrappers"
        )
    return FAMILIES[kind]


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    return cast(nn.ModuleList, model.get_submodule(family_of(model).blocks))


def partition_of(model: PreTrainedModel, masking: MaskingConfig, space: LabelSpace) -> Partition:
    """Groups of the model's heads and neurons; raises ValueError as `roles.partition_of`."""
    family, heads = family_of(model), model.config.num_attention_heads
    kv_heads = getattr(model.config, "num_key_value_heads", None) or heads
    return roles.partition_of(model, family, heads, kv_heads, masking, space)


def masked_modules(model: PreTrainedModel, partition: Partition) -> list[Masked]:
    """All modules with masks; raises ValueError as `roles.masked_modules`."""
    family = family_of(model)
    ends = [(model.get_input_embeddings(), "embedding"), (model.get_output_embeddings(), "head")]
    paths = {id(module): path for path, module in model.named_modules()}
    outer = (*(Role(paths[id(module)], kind) for module, kind in ends), *family.outer)
    return roles.masked_modules(model, replace(family, outer=outer), partition)
