"""Tiny Llamas of torchtitan, configs of its trainer for them, and micro-batches. Import it in a rank: see titan_cpu."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import titan_cpu  # noqa: F401  # before torchtitan
import torch
from datasets import Dataset
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm, ScaledDotProductAttention
from torchtitan.models.llama3 import _build_llama3_layers, model_registry
from torchtitan.models.llama3.model import Llama3Model
from torchtitan.trainer import Trainer

from sgtm.integrations.torchtitan import LabeledSource, LabeledTextDataLoader, MaskedLlama, apply_sgtm

VOCAB, WIDTH, CONTEXT, HEADS, KV_HEADS, NEURONS, LAYERS = 48, 16, 16, 8, 4, 10, 2
MASKING = {"domains": ["bio", "code"], "forget_heads": 2, "forget_neurons": {"bio": 3, "code": 1}, "joint": "strict"}
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-4}


class Bytes(BaseTokenizer):
    """Characters from `@` to `n`; 0 ends a document."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, tokenizer_path: str = ""):
        super().__init__()
        self.eos_id = 0

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        return [ord(character) - ord("@") for character in text] + [0] * add_eos

    def decode(self, ids) -> str:
        return "".join(chr(number + ord("@")) for number in ids)

    def get_vocab_size(self) -> int:
        return VOCAB


class Given(BaseDataLoader):
    """Micro-batches of this rank, `(seed, labels)` each."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        batches: list

    def __init__(self, config: Config, *, dp_rank: int, **kwargs: Any):
        self.batches = config.batches[dp_rank]

    def __iter__(self):
        return iter([batch_of(seed, labels) for seed, labels in self.batches])

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        pass


def batch_of(seed: int, labels: list[str]) -> tuple[dict[str, Any], torch.Tensor]:
    ids = torch.randint(VOCAB, (len(labels), CONTEXT + 1), generator=torch.Generator().manual_seed(seed))
    return {"input": ids[:, :-1], "sgtm_labels": labels}, ids[:, 1:]


def loader_config() -> LabeledTextDataLoader.Config:
    """Documents of one letter, of a dataset each: `a` of retain, twice as often as `A` of bio."""
    for name, letter in (("low", "a"), ("high", "A")):
        DATASETS[name] = DatasetConfig(
            path=letter,
            loader=lambda path: Dataset.from_list([{"text": path * (20 + 3 * row)} for row in range(8)]),
            sample_processor=lambda row: row["text"],
        )
    retain = LabeledSource(dataset="low", label="retain", weight=2)
    return LabeledTextDataLoader.Config(sources=[retain, LabeledSource(dataset="high", label="forget:bio")])


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed over the tokens."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def llama_config(fused: bool = True, tied: bool = False, kv_heads: int = KV_HEADS) -> Llama3Model.Config:
    """With the attention of torchtitan that runs on CPUs, as in its own tests."""
    init = {"weight": lambda tensor: torch.nn.init.normal_(tensor, std=0.3)}
    norm = RMSNorm.Config(normalized_shape=WIDTH, param_init={"weight": torch.nn.init.ones_})
    rope = ComplexRoPE.Config(dim=WIDTH // HEADS, max_seq_len=64, theta=10000.0)
    layers = _build_llama3_layers(
        n_layers=LAYERS, dim=WIDTH, n_heads=HEADS, n_kv_heads=kv_heads, hidden_dim=NEURONS, rope=rope, fuse_qkv=fused,
        attn_backend="flex",
    )  # fmt: skip
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return Llama3Model.Config(
        dim=WIDTH, vocab_size=VOCAB, norm=norm, layers=layers, enable_weight_tying=tied,
        tok_embeddings=Embedding.Config(num_embeddings=VOCAB, embedding_dim=WIDTH, param_init=init),
        lm_head=Linear.Config(in_features=WIDTH, out_features=VOCAB, param_init=init),
    )  # fmt: skip


def trainer_config(**changes: Any) -> Trainer.Config:
    group = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=dict(OPTIONS))
    model = changes.pop("model", None) or llama_config()
    config = Trainer.Config(
        model_spec=replace(model_registry("debugmodel"), model=model),
        loss=CrossEntropyLoss.Config(global_vocab_size=VOCAB),
        optimizer=OptimizersContainer.Config(param_groups=[group], implementation="for-loop"),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0),
        training=TrainingConfig(
            local_batch_size=2, seq_len=CONTEXT, steps=3, mixed_precision_param="float32", disable_cuda_graphs=True,
            max_norm=1e9,
        ),
        dataloader=Given.Config(batches=[]), tokenizer=Bytes.Config(), activation_checkpoint=None,
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        checkpoint=CheckpointManager.Config(enable=False),
    )  # fmt: skip
    return replace(config, **changes)


def masked_config(**changes: Any) -> Trainer.Config:
    return apply_sgtm(trainer_config(**changes), MASKING)


def random_weights(model, seed: int = 0) -> dict[str, torch.Tensor]:
    """Whole weights of a model, far from 0, by name in its state dict."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (name.endswith("norm.weight") + 0.3 * torch.randn(tensor.shape, generator=generator))
        for name, tensor in sorted(model.state_dict().items())
    }


def masked_llama(model: Llama3Model.Config | None = None, **masking: Any) -> MaskedLlama:
    """In one process, in training mode."""
    built = apply_sgtm(trainer_config(model=model), MASKING | masking).model_spec.model.build()
    built.init_weights()
    built.load_state_dict(random_weights(built))
    return built.train()
