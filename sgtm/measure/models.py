"""The models that a training step is timed on: shape, partition and masks of the presets, read without any package."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from pathlib import Path

from sgtm.masking.labels import LabelSpace
from sgtm.masking.partition import Partition, build_partition

PRESETS = Path(__file__).parents[1] / "config" / "presets"
LABELS = LabelSpace(("forget",))


@dataclass(frozen=True)
class ModelShape:
    """Section `model` of a preset; fields, defaults and properties of `sgtm.config.schema.ModelConfig`."""

    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    vocab_size: int
    context: int
    family: str = "gpt_neo"
    kv_heads: int | None = None
    head_dim: int | None = None
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

    def window_of(self, layer: int) -> int | None:
        return self.window if layer % 2 else None

    def flops_per_token(self, parameters: int) -> float:
        """Of forward and backward of an unmasked step: 6 N + 12 L H Q T (Chowdhery et al., 2022, appendix B).

        N is `parameters`, without what is only looked up, so with the head; L layers of H heads of size Q. T is the
        context, causal or not, or the window of a local layer.
        """
        keys = sum(min(self.window_of(i) or self.context, self.context) for i in range(self.layers))
        return 6 * parameters + 12 * keys * self.heads * self.size_per_head


@dataclass(frozen=True)
class Setting:
    """A model, its groups, and one step: `accumulation` micro-batches of `micro_batch` sequences."""

    model: ModelShape
    forget_heads: int
    forget_neurons: int
    joint: str
    micro_batch: int
    accumulation: int

    @property
    def sequences(self) -> int:
        return self.micro_batch * self.accumulation

    @property
    def partition(self) -> Partition:
        return build_partition(
            LABELS,
            layers=self.model.layers,
            heads=self.model.heads,
            kv_heads=self.model.num_kv_heads,
            neurons=self.model.intermediate_size,
            forget_heads=self.forget_heads,
            forget_neurons=self.forget_neurons,
        )


def sections_of(text: str) -> dict[str, dict]:
    """Sections of a preset with their numbers, booleans and words; other values as they are written. A GPU machine may
    lack a package for YAML."""
    found: dict[str, dict] = {}
    section: dict = {}
    for line in text.splitlines():
        key, _, value = line.partition(" #")[0].strip().partition(":")
        if key and not line.startswith(("#", " ")):
            section = found.setdefault(key, {})
        elif key and not key.startswith("#"):
            section[key] = _scalar(value.strip())
    return found


def _scalar(text: str) -> object:
    named = {"true": True, "false": False, "null": None}
    try:
        return named[text] if text in named else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def preset(name: str, micro_batch: int, accumulation: int) -> Setting:
    """Of sgtm/config/presets, with activations kept: these micro-batches fit into 80 GB beside the plain model."""
    sections = sections_of((PRESETS / f"{name}.yaml").read_text())
    masking, model = sections["masking"], ModelShape(**sections["model"])
    return Setting(
        replace(model, activation_checkpointing=False),
        masking["forget_heads"],
        masking["forget_neurons"],
        masking.get("joint", "free"),
        micro_batch,
        accumulation,
    )


TINY_LLAMA = ModelShape(
    2, 24, 6, 40, 97, 64, family="llama", kv_heads=3, head_dim=4, tie_embeddings=False, init_std=0.2
)
# Twenty sequences: one is 5 %. Sixteen of Llama's context would not fit, and AdamW is too much of a step of two.
SETTINGS = {
    "124m": lambda: preset("gpt2-124m", 20, 1),
    "254m": lambda: preset("wikipedia-254m", 20, 1),
    "llama-1b": lambda: preset("llama-1b", 2, 2),
    "tiny": lambda: preset("debug", 20, 1),
    "tiny-llama": lambda: Setting(TINY_LLAMA, 2, 8, "masked", 2, 2),
}
