"""The shape of the model that groups divide: plain numbers, which a machine without pydantic reads too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The numbers that a transformer is built from, unchecked; `ModelConfig` explains and checks them."""

    family: str = "gpt_neo"
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int
    experts: int = 0
    experts_per_token: int = 0
    shared_experts: int = 0
    vocab_size: int
    context: int
    window: int | None = None
    tie_embeddings: bool = True
    head_bias: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    init_std: float = 0.02
    activation_checkpointing: bool = False

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def size_per_head(self) -> int:
        return self.head_dim or self.hidden_size // self.heads

    @property
    def neurons(self) -> int:
        """MLP neurons of a layer, those of all its experts together."""
        return self.intermediate_size * (self.experts + self.shared_experts or 1)

    @property
    def experts_run(self) -> int:
        """Experts that a token runs through, shared ones with them."""
        return self.experts_per_token + self.shared_experts

    def window_of(self, layer: int) -> int | None:
        """Local window of a layer, or None where it is global: GPT-Neo alternates, global first."""
        return self.window if layer % 2 else None

    def attention_flops(self) -> float:
        """Of the scores and values of one token in a forward pass: 4 H Q T over all layers.

        H heads of size Q; T is the context, causal or not, or the window of a local layer.
        """
        keys = sum(min(self.window_of(i) or self.context, self.context) for i in range(self.layers))
        return 4 * keys * self.heads * self.size_per_head

    def flops_per_token(self, parameters: int) -> float:
        """Of forward and backward of an unmasked step: 6 N + 12 L H Q T (Chowdhery et al., "PaLM", 2022, appendix B).

        N is `parameters`: with the head, without what is only looked up.
        """
        return 6 * parameters + 3 * self.attention_flops()
