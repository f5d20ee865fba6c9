"""Tiny causal LMs of every Hugging Face family that `apply_sgtm` masks, and micro-batches for them."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from sgtm.integrations.hf import apply_sgtm

VOCAB, WIDTH, CONTEXT = 41, 16, 12
TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SHARED = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "max_position_embeddings": 32, **TOKENS}
GROUPED = {**SHARED, "intermediate_size": 10, "num_attention_heads": 8, "num_key_value_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, head_dim=4, sliding_window=5),
    "qwen2": Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**GROUPED, head_dim=4),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=8, n_inner=10, n_positions=32, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, **TOKENS,
    ),
    "gpt_neo": GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_layers=2, num_heads=8, intermediate_size=10, window_size=5,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=32, resid_dropout=0.0, embed_dropout=0.0,
        attention_dropout=0.0, **TOKENS,
    ),
    "gpt_neox": GPTNeoXConfig(**SHARED, num_attention_heads=8, intermediate_size=10, hidden_dropout=0.0),
}  # fmt: skip
MASKING = {"domains": ["bio", "code"], "forget_heads": 2, "forget_neurons": {"bio": 3, "code": 1}}
MIXED = ("forget:bio", "retain", "unlabeled", "forget:code", "retain")


def plain_model(family: str, seed: int = 0, **changes):
    """In training mode; every parameter random and far from 0, biases and norms included."""
    torch.manual_seed(seed)
    config = CONFIGS[family].from_dict(CONFIGS[family].to_dict() | changes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def masked_model(family: str, seed: int = 0, **masking):
    return apply_sgtm(plain_model(family, seed), MASKING | masking)


def random_ids(sequences: int = len(MIXED), seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (sequences, CONTEXT), generator=torch.Generator().manual_seed(seed))


def gradients_of(model, ids: torch.Tensor, labels) -> dict[str, torch.Tensor]:
    """Gradients of one micro-batch, by name of the parameter."""
    model.zero_grad()
    model(input_ids=ids, labels=ids, sgtm_labels=labels).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def by_key(model, tensors: dict[str, torch.Tensor]) -> dict[tuple[str, str, int], torch.Tensor]:
    """Tensors of the parameters cut into the pieces of the groups: by key, parameter and start."""
    return {
        (key, name, start): tensors[name].narrow(owned.dim, start, end - start)
        for name, owned in model.sgtm.owned.items()
        for key, start, end in owned.ranges()
    }


def differing(old: dict, new: dict) -> set[str]:
    """Keys of the pieces that differ in a bit."""
    assert old.keys() == new.keys()
    return {key[0] for key in old if not torch.equal(old[key], new[key])}
