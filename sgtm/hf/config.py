"""Model shapes of Hugging Face, both ways.

Promises that a shape which crosses over computes the same function on the other side: what our transformer does not
have (attention biases, scaled rotary embeddings, other activations) is refused by name, never dropped.
`tests/unit/test_hf_config.py` has each refused feature, and `test_weights.py` compares logits across the border.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import (
    GPTNeoConfig,
    GraniteMoeSharedConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
)

from sgtm.config.schema import ModelConfig
from sgtm.hf.experts import experts_config, experts_shape

log = logging.getLogger(__name__)

GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")  # two names of one function


def model_config_from_hf(config: PretrainedConfig) -> ModelConfig:
    """Shape of a pretrained GPT-Neo, Llama or Mixtral model (or a Mistral one without a sliding window, or a Granite
    MoE one with shared experts and without multipliers), to train it further.

    Raises ValueError naming the key for whatever our transformer cannot compute. Dropout only shapes training, so it is
    reported and left out.
    """
    if isinstance(config, GPTNeoConfig):
        return _from_gpt_neo(config)
    if isinstance(config, (LlamaConfig, MistralConfig, MixtralConfig, GraniteMoeSharedConfig)):
        return _from_llama(config)
    raise ValueError(
        f"model_type {config.model_type!r} cannot be imported; known: gpt_neo, llama, mistral, mixtral, "
        f"granitemoeshared"
    )


def hf_config(
    config: ModelConfig, *, heads: int, kv_heads: int, neurons: int | None = None, experts: int = 0
) -> PretrainedConfig:
    """Hugging Face config of a model that has kept `heads` query heads, `kv_heads` KV heads and `neurons` per layer, or
    `experts` with all of their neurons.

    `LlamaConfig` insists that hidden_size is a multiple of the number of heads, even where head_dim is given. A model
    for which it is not (31 of 32 heads, say) becomes a Mistral one without a sliding window: the same computation, the
    same parameter names, and no such rule.

    Raises ValueError for a head bias, which Hugging Face's GPT-Neo does not have, and as `experts_config` does.
    """
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size if neurons is None else neurons,
        "max_position_embeddings": config.context,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if config.family == "gpt_neo":
        if config.head_bias:
            raise ValueError(
                "model.head_bias true: GPT-Neo's LM head has no bias in Hugging Face, so this model cannot be "
                "exported; train with model.head_bias false"
            )
        return GPTNeoConfig(
            num_layers=config.layers,
            num_heads=heads,
            attention_types=_attention_types(config),
            window_size=config.window or config.context,
            layer_norm_epsilon=config.norm_eps,
            **common,
        )
    llama: dict[str, Any] = {
        "num_hidden_layers": config.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": config.size_per_head,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **common,
    }
    if config.experts:
        return experts_config(config, experts, llama)
    if config.hidden_size % heads:
        return MistralConfig(sliding_window=None, **llama)
    return LlamaConfig(**llama)


def why_architecture(config: ModelConfig, exported: PretrainedConfig) -> str | None:
    """Why a run is exported as another architecture than its family; None where it is not."""
    if exported.model_type == "granitemoeshared":
        return "Mixtral has no shared experts; Granite MoE with multipliers of 1 is the same computation with them"
    if exported.model_type != "mistral":
        return None
    return (
        f"{exported.num_attention_heads} heads do not divide hidden_size {config.hidden_size}, which the Llama of "
        f"transformers 5 insists on; Mistral without a sliding window is the same computation with the same names"
    )


def _attention_types(config: ModelConfig) -> list:
    """GPT-Neo's run-length notation of global and local layers."""
    if config.window is None:
        return [[["global"], config.layers]]
    pairs, odd = divmod(config.layers, 2)
    return [[["global", "local"], pairs]] * (pairs > 0) + [[["global"], 1]] * odd


def _from_gpt_neo(config: GPTNeoConfig) -> ModelConfig:
    _require(config, "activation_function", config.activation_function in GELU_TANH, " or ".join(GELU_TANH))
    _require(config, "tie_word_embeddings", config.tie_word_embeddings, "true")
    _warn_dropout(config, "resid_dropout", "embed_dropout", "attention_dropout")
    layers = list(config.attention_layers)
    alternating = ["local" if i % 2 else "global" for i in range(config.num_layers)]
    if "local" in layers:
        _require(config, "attention_layers", layers == alternating, "all global, or global and local in turn")
    return ModelConfig(
        family="gpt_neo",
        layers=config.num_layers,
        hidden_size=config.hidden_size,
        heads=config.num_heads,
        intermediate_size=config.intermediate_size or 4 * config.hidden_size,
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        window=config.window_size if "local" in layers else None,
        norm_eps=config.layer_norm_epsilon,
        init_std=config.initializer_range,
    )


def _from_llama(config: LlamaConfig | MistralConfig | MixtralConfig | GraniteMoeSharedConfig) -> ModelConfig:
    _require(config, "hidden_act", config.hidden_act == "silu", "silu")
    for key in ("attention_bias", "mlp_bias"):
        _require(config, key, not getattr(config, key, False), "false")
    window = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    _require(config, "sliding_window", not window, "null")
    rope: Mapping[str, Any] = config.rope_parameters or {}
    plain = rope.get("rope_type", "default") == "default" and rope.get("partial_rotary_factor", 1.0) == 1.0
    plain = plain and "rope_theta" in rope
    _require(config, "rope_parameters", plain, "rope_theta, and rope_type default over the whole head (no scaling)")
    _warn_dropout(config, "attention_dropout")
    shape: dict[str, Any] = {"family": "llama", "intermediate_size": config.intermediate_size}
    if isinstance(config, (MixtralConfig, GraniteMoeSharedConfig)):
        shape["family"] = "mixtral"
        shape |= experts_shape(config, lambda *requirement: _require(config, *requirement))
    return ModelConfig(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None),
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        tie_embeddings=config.tie_word_embeddings,
        norm_eps=config.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        init_std=config.initializer_range,
        **shape,
    )


def _require(config: PretrainedConfig, key: str, satisfied: bool, right: str) -> None:
    if not satisfied:
        raise ValueError(f"{config.model_type} config: {key} is {getattr(config, key)!r}, only {right} can be imported")


def _warn_dropout(config: PretrainedConfig, *keys: str) -> None:
    used = {key: getattr(config, key) for key in keys if getattr(config, key)}
    if used:
        log.warning("training here has no dropout; left out of the %s config: %s", config.model_type, used)
