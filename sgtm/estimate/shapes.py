"""Parameters and FLOPs of a model, from its config: what `Transformer` would hold, without building it."""

from __future__ import annotations

from math import prod

from sgtm.config.schema import Config, ModelConfig
from sgtm.model.domain_parts import domain_parts


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter; names and order as in `Transformer.named_parameters()`."""
    own = domain_parts(config.partition, config.model.vocab_size, config.model.hidden_size, config.model.tie_embeddings)
    return _shapes(config.model, {part.name: part.shape for part in own})


def _shapes(model: ModelConfig, own: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    d, q, neo = model.hidden_size, model.size_per_head, model.family == "gpt_neo"
    kv, heads, neurons = model.num_kv_heads, model.heads, model.neurons
    shapes: dict[str, tuple[int, ...]] = {"embedding": (model.vocab_size, d)}
    if neo:
        shapes["position"] = (model.context, d)
    if not model.tie_embeddings:
        shapes["head"] = (model.vocab_size, d)
    if model.head_bias:
        shapes["head_bias"] = (model.vocab_size,)
    shapes |= own
    rows = {"w_in": (neurons if neo else 2 * neurons, d), "b_in": (neurons,), "w_out": (neurons, d), "b_out": (d,)}
    for i in range(model.layers):
        block = f"blocks.{i}"
        shapes |= _norm(f"{block}.attention_norm", d, neo)
        shapes[f"{block}.attention.w_qkv"] = ((heads + 2 * kv) * q, d)
        shapes[f"{block}.attention.w_o"] = (heads * q, d)
        if neo:
            shapes[f"{block}.attention.b_o"] = (d,)
        shapes |= _norm(f"{block}.mlp_norm", d, neo)
        if model.experts:
            shapes[f"{block}.mlp.router"] = (model.experts, d)
        shapes |= {f"{block}.mlp.{name}": shape for name, shape in rows.items() if neo or name[0] == "w"}
    return shapes | _norm("final_norm", d, neo)


def _norm(name: str, size: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{leaf}": (size,) for leaf in (("weight", "bias") if bias else ("weight",))}


def parameter_sizes(config: Config) -> dict[str, int]:
    """Number of elements of every parameter."""
    return {name: prod(shape) for name, shape in parameter_shapes(config).items()}


def model_flops(model: ModelConfig) -> float:
    """Of forward and backward for one token of an unmasked step, without a domain's own part of the embedding."""
    return model.flops_per_token(_multiplied(model))


def recomputed_flops(model: ModelConfig) -> float:
    """Of the second forward pass of all blocks for one token, where their activations are checkpointed."""
    if not model.activation_checkpointing:
        return 0.0
    head = model.vocab_size * model.hidden_size
    return 2 * (_multiplied(model) - head) + model.attention_flops()


def _multiplied(model: ModelConfig) -> int:
    """Parameters that a token is multiplied with: of experts, those that it runs through."""
    sizes = {name: prod(shape) for name, shape in _shapes(model, {}).items()}
    looked_up = ("position",) if model.tie_embeddings else ("position", "embedding")
    others = 0
    if model.experts:
        number = model.experts + model.shared_experts
        in_experts = sum(size for name, size in sizes.items() if name.endswith(("mlp.w_in", "mlp.w_out")))
        others = in_experts * (number - model.experts_run) // number
    return sum(size for name, size in sizes.items() if name not in looked_up) - others
