"""The section `model` of a config, and what every section is made of."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from sgtm.masking.shape import ModelShape


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelConfig(Section, ModelShape):  # type: ignore[misc] # frozen, but mypy reads no model_config
    """Shape of the transformer."""

    family: Literal["gpt_neo", "llama", "mixtral"] = "gpt_neo"
    """`gpt_neo`: LayerNorm, learned positions, tanh-GELU, attention scale 1, tied head.
    `llama`: RMSNorm, RoPE, SwiGLU.
    `mixtral`: as llama, with experts in place of the MLP, of which a router chooses some for each token."""
    layers: PositiveInt
    """Transformer blocks, each attention and an MLP."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    heads: PositiveInt
    """Attention heads of each layer, all groups together."""
    kv_heads: PositiveInt | None = None
    """KV heads of grouped-query attention (not gpt_neo); null: as many as heads."""
    head_dim: PositiveInt | None = None
    """Width of a head; null: hidden_size / heads."""
    intermediate_size: PositiveInt
    """Number of MLP neurons; of each expert (mixtral)."""
    experts: NonNegativeInt = 0
    """Experts of a layer that the router chooses from, all groups together (mixtral)."""
    experts_per_token: NonNegativeInt = 0
    """Experts that the router chooses for a token, at least 2 (mixtral): their weights add up to 1, so that a single
    one would leave the router without a gradient."""
    shared_experts: NonNegativeInt = 0
    """Experts beside these that every token runs through (mixtral). They belong to the retain group."""
    vocab_size: PositiveInt
    """Rows of the token embedding: the tokenizer's entries, or up to the next multiple of 128."""
    context: PositiveInt
    """Tokens of a training sequence and the longest one the model takes."""
    window: PositiveInt | None = None
    """Local attention window of every second layer, beginning with the second (gpt_neo); null: all layers global."""
    tie_embeddings: bool = True
    """Whether the LM head is the token embedding (gpt_neo always ties)."""
    head_bias: bool = False
    """Whether the LM head has a bias (gpt_neo)."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance in LayerNorm and RMSNorm."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary positions' wavelengths (not gpt_neo)."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weight matrices."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""

    @model_validator(mode="after")
    def _consistent(self):
        if self.head_dim is None and self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}; set head_dim")
        if self.heads % self.num_kv_heads:
            raise ValueError(
                f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}; kv_heads must divide it"
            )
        if self.family == "gpt_neo":
            if self.kv_heads not in (None, self.heads):
                raise ValueError(
                    f"kv_heads {self.kv_heads}: family gpt_neo has a KV head for each of heads {self.heads}; set "
                    f"kv_heads null, or family llama"
                )
            if not self.tie_embeddings:
                raise ValueError("tie_embeddings false: family gpt_neo always ties; set it true, or family llama")
            if self.head_dim not in (None, self.hidden_size // self.heads):
                raise ValueError(
                    f"head_dim {self.head_dim}: family gpt_neo takes hidden_size / heads alone; set head_dim null, or "
                    f"family llama"
                )
        elif self.window is not None:
            raise ValueError(f"window {self.window}: family {self.family} has none; set window null, or family gpt_neo")
        elif self.head_bias:
            raise ValueError(f"head_bias true: family {self.family} has none; set it false, or family gpt_neo")
        self._check_experts()
        return self

    def _check_experts(self) -> None:
        if self.family == "mixtral":
            if not 2 <= self.experts_per_token <= self.experts:
                raise ValueError(
                    f"experts_per_token {self.experts_per_token}: family mixtral takes at least 2 and at most experts "
                    f"{self.experts}"
                )
            return
        for key in ("experts", "experts_per_token", "shared_experts"):
            if value := getattr(self, key):
                raise ValueError(f"{key} {value}: family {self.family} has no experts; set it 0, or family mixtral")
