"""The models that a training step is timed on: shape, partition and masks of the presets, read without any package."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from pathlib import Path

from sgtm.masking.labels import LabelSpace
from sgtm.masking.partition import Partition, build_partition
from sgtm.masking.shape import ModelShape
from sgtm.masking.strategy import Joint

PRESET_FOLDER = Path(__file__).parents[1] / "config" / "presets"
LABELS = LabelSpace(("forget",))


@dataclass(frozen=True)
class Setting:
    """A model, its groups, and one step: `accumulation` micro-batches of `micro_batch` sequences."""

    model: ModelShape
    forget_heads: int
    forget_neurons: int
    joint: Joint
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
    sections: dict[str, dict] = {}
    section: dict = {}
    for line in text.splitlines():
        key, _, value = line.partition(" #")[0].strip().partition(":")
        if key and not line.startswith(("#", " ")):
            section = sections.setdefault(key, {})
        elif key and not key.startswith("#"):
            section[key] = _scalar(value.strip())
    return sections


def _scalar(text: str) -> object:
    named = {"true": True, "false": False, "null": None}
    try:
        return named[text] if text in named else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def preset(name: str, micro_batch: int, accumulation: int) -> Setting:
    """Of sgtm/config/presets, with activations kept: these micro-batches fit into 80 GB beside the plain model."""
    sections = sections_of((PRESET_FOLDER / f"{name}.yaml").read_text())
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
    family="llama",
    layers=2,
    hidden_size=24,
    heads=6,
    kv_heads=3,
    head_dim=4,
    intermediate_size=40,
    vocab_size=97,
    context=64,
    tie_embeddings=False,
    init_std=0.2,
)
# Twenty sequences: one is 5 %. Sixteen of Llama's context would not fit, and AdamW is too much of a step of two.
SETTINGS = {
    "124m": lambda: preset("gpt2-124m", 20, 1),
    "254m": lambda: preset("wikipedia-254m", 20, 1),
    "llama-1b": lambda: preset("llama-1b", 2, 2),
    "tiny": lambda: preset("debug", 20, 1),
    "tiny-llama": lambda: Setting(TINY_LLAMA, 2, 8, "masked", 2, 2),
}
