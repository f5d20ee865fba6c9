"""Shapes of Hugging Face: what our transformer cannot compute is refused by its key."""

from __future__ import annotations

import pytest
from transformers import GPTNeoConfig, LlamaConfig, MistralConfig

from sgtm.config.schema import ModelConfig
from sgtm.hf.config import hf_config, model_config_from_hf


def llama(**changes) -> LlamaConfig:
    return LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=61, **changes)


def neo(**changes) -> GPTNeoConfig:
    shape = {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]]}
    return GPTNeoConfig(**shape | changes)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (llama(attention_bias=True), "attention_bias"),
        (llama(mlp_bias=True), "mlp_bias"),
        (llama(hidden_act="gelu"), "hidden_act"),
        (llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "rope_parameters"),
        (llama(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), "rope_parameters"),
        (MistralConfig(hidden_size=32, num_attention_heads=8, sliding_window=16), "sliding_window"),
        (neo(activation_function="relu"), "activation_function"),
        (neo(tie_word_embeddings=False), "tie_word_embeddings"),
        (neo(attention_types=[[["local"], 2]]), "attention_layers"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
def test_what_cannot_be_computed_is_refused_by_name(config, key):
    with pytest.raises(ValueError, match=f"config: {key} is"):
        model_config_from_hf(config)


def test_dropout_is_reported_and_left_out(caplog):
    assert model_config_from_hf(neo(resid_dropout=0.1)) == model_config_from_hf(neo())
    assert "resid_dropout" in caplog.text


SHAPE = {"hidden_size": 32, "heads": 4, "intermediate_size": 48, "vocab_size": 61, "context": 20, "norm_eps": 1e-3}


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "gpt_neo", "layers": 3, "window": 7},
        {"family": "gpt_neo", "layers": 2, "window": None},
        {"family": "llama", "layers": 2, "kv_heads": 2, "head_dim": 12, "rope_theta": 50.0, "tie_embeddings": False},
        {"family": "llama", "layers": 1, "heads": 3, "kv_heads": 3, "head_dim": 8, "init_std": 0.5},  # Mistral's
    ],
    ids=str,
)
def test_a_shape_comes_back_as_it_went(changes):
    config = ModelConfig(**SHAPE | changes)
    exported = hf_config(config, heads=config.heads, kv_heads=config.num_kv_heads, neurons=config.intermediate_size)
    assert model_config_from_hf(exported) == config
