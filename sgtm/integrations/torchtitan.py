"""SGTM in torchtitan: its Llama 3 with masks under FSDP2, exact freeze in its optimizers, labels in its batches.

In a config function of yours, which torchtitan finds with `--module`:

    def llama3_sgtm() -> Trainer.Config:
        config = apply_sgtm(llama3_8b(), {"domains": ["bio"], "forget_heads": 2, "forget_neurons": 128})
        config.dataloader = LabeledTextDataLoader.Config(sources=[
            LabeledSource(dataset="c4", label="retain", weight=9), LabeledSource(dataset="papers", label="forget:bio"),
        ])
        config.parallelism.spmd_backend = "partial_dtensor"
        config.training.disable_cuda_graphs = True
        return config

torchtitan builds a model from its config before any parallelism, so the masks are in a config of the model that builds
the same modules with masked classes. They stay where activation checkpointing and `fully_shard` wrap them. The
decorator `@override` cannot do that: it replaces parts of a model, and the trainer does not build a whole one that it
has replaced.

Promises: tests/dist/test_integrations_torchtitan.py, with torchtitan 0.3.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config.override import derive
from torchtitan.hf_datasets.text_datasets import (
    HFDataSource,
    HuggingFaceTextDataset,
    InterleavedHuggingFaceTextDataLoader,
)
from torchtitan.models.common.attention import FusedQKVLinear
from torchtitan.models.llama3.model import Llama3Model
from torchtitan.trainer import Trainer

from sgtm.config.sections import MaskingConfig
from sgtm.integrations.binding import LABELS, Binding, Bound, ablate, label_number
from sgtm.integrations.modules import mask_model, swap_class
from sgtm.integrations.optimizer import SgtmAdamW
from sgtm.integrations.roles import Family, Role, masked_modules, partition_of
from sgtm.integrations.settings import check_masking, space_of

__all__ = ["LabeledSource", "LabeledTextDataLoader", "MaskedLlama", "SgtmOptimizers", "ablate", "apply_sgtm"]

OPTIONS = {"lr", "betas", "eps", "weight_decay", "fused", "foreach"}
"""Of AdamW; the last two choose between implementations of it, which SgtmAdamW does by itself."""


def _family(*qkv: Role) -> Family:
    return Family(
        "layers",
        (
            Role("attention_norm", "norm"),
            *qkv,
            Role("attention.wo", "attn_out", "heads"),
            Role("ffn_norm", "norm"),
            Role("feed_forward.w1", "mlp_in", "neurons"),
            Role("feed_forward.w3", "mlp_in", "neurons"),
            Role("feed_forward.w2", "mlp_out", "neurons"),
        ),
        (Role("tok_embeddings", "embedding"), Role("lm_head", "head"), Role("norm", "final_norm")),
    )


def family_of(model: Llama3Model) -> Family:
    """Its table; the weight of a fused projection has the queries, key and value of one KV head after the other."""
    fused = model.layers["0"].attention.qkv_linear
    if isinstance(fused, FusedQKVLinear):
        return _family(Role("attention.qkv_linear.wqkv", "attn_in", "kv_heads", share=fused.r_dim))
    return _family(
        Role("attention.qkv_linear.wq", "attn_in", "heads"),
        Role("attention.qkv_linear.wk", "attn_in", "kv_heads"),
        Role("attention.qkv_linear.wv", "attn_in", "kv_heads"),
    )


def apply_sgtm(config: Trainer.Config, masking: MaskingConfig | Mapping[str, Any]) -> Trainer.Config:
    """The config of a trainer that masks its Llama 3 and freezes what the labels of a step may not update.

    config   is changed: `model_spec.model` and `optimizer` become masked ones of the same settings
    masking  section `masking` of a config, or its keys (docs/config.md). A domain has the last heads and neurons of
             each layer, and the last domain the very last; with grouped-query attention it has whole KV groups.

    The model takes `sgtm_labels`, as `LabeledTextDataLoader` has them in its batches. Group sizes are checked where the
    model is built, and settings of the trainer that masks do not work with where it begins.

    Raises ValueError for another model than Llama 3, for optimizers other than AdamW, if the config is masked already,
    and for settings that need our own transformer (`domain_embedding`, `certify`).
    """
    checked, spec = check_masking(masking), config.model_spec
    model = None if spec is None else spec.model
    if isinstance(model, MaskedLlama.Config):
        raise ValueError("the config is masked already; call apply_sgtm once")
    if type(model) is not Llama3Model.Config:
        name = "no model" if model is None else type(model).__qualname__
        raise ValueError(f"model_spec has {name}; only torchtitan's Llama3Model.Config can be masked")
    names = {group.optimizer_name for group in config.optimizer.param_groups}
    if type(config.optimizer) is not OptimizersContainer.Config or names != {"AdamW"}:
        groups = ", ".join(sorted(names)) or "no param_groups"
        raise ValueError(f"optimizer is {type(config.optimizer).__qualname__} of {groups}; only AdamW can be masked")
    config.model_spec = replace(spec, model=derive(model, MaskedLlama.Config, masking=checked.model_dump()))
    config.optimizer = derive(config.optimizer, SgtmOptimizers.Config)
    return config


class MaskedLlama(Llama3Model):
    """Llama 3 of torchtitan with masks: the same parameters, names and state dict."""

    @dataclass(kw_only=True, slots=True)
    class Config(Llama3Model.Config):
        masking: dict = field(default_factory=dict)
        """Section `masking`, as `apply_sgtm` has checked it."""

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            Llama3Model.Config.update_from_config(self, config=config, **kwargs)
            if isinstance(config, Trainer.Config):
                _check(config)

    sgtm: Binding

    def __init__(self, config: Config):
        """Raises ValueError for groups that do not fit and for modules that the masks would miss."""
        super().__init__(config)
        masking, family, attention = check_masking(config.masking), family_of(self), self.layers["0"].attention
        heads, kv_heads = attention.n_heads, attention.n_kv_heads
        partition = partition_of(self, family, heads, kv_heads, masking, space_of(masking))
        masked = masked_modules(self, family, partition)
        binding = mask_model(self, masking, partition, masked, self.layers.values())
        swap_class(self.lm_head, ChunkHead, binding)


class ChunkHead(Bound):
    """A head that `ChunkedLossWrapper` calls with parts of all sequences, when the call of the model has ended."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        plan = self.sgtm.plan
        with self.sgtm.using(self.sgtm.plan_of_part(x) if plan is None else plan):
            return super().forward(x)  # type: ignore[misc]


def _check(config: Trainer.Config) -> None:
    """Raises ValueError for settings of a trainer that masks do not work with, and for labels that are unknown."""
    parallelism, components = config.parallelism, config.compile.components if config.compile.enable else []
    needed = [
        ("parallelism.spmd_backend", parallelism.spmd_backend, "partial_dtensor"),
        ("parallelism.tensor_parallel_degree", parallelism.tensor_parallel_degree, 1),
        ("parallelism.pipeline_parallel_degree", parallelism.pipeline_parallel_degree, 1),
        ("parallelism.context_parallel_degree", parallelism.context_parallel_degree, 1),
        # A graph would replay the masks of the step in which it was captured.
        ("training.disable_cuda_graphs", config.training.disable_cuda_graphs, True),
        # Whole layers are compiled, and the masked modules are never in a graph.
        ("compile.components", components, [name for name in components if name != "model"]),
    ]
    for key, value, right in needed:
        if value != right:
            raise ValueError(f"{key} is {value!r}; a masked Llama needs {right!r}")
    if not isinstance(config.optimizer, SgtmOptimizers.Config):
        raise ValueError(
            f"optimizer is {type(config.optimizer).__qualname__}, which would update what the labels freeze; call "
            f"apply_sgtm after it is set"
        )
    space = space_of(check_masking(config.model_spec.model.masking))
    for source in getattr(config.dataloader, "sources", ()):
        if isinstance(source, LabeledSource):
            label_number(source.label, space)


class SgtmOptimizers(OptimizersContainer):
    """Container of one `SgtmAdamW`, with the parameter groups of the config.

    Raises ValueError for options that it does not have, such as `amsgrad` and moments in bf16.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    def __init__(self, config: Config, *, model_parts: list[nn.Module]):
        if config.implementation == "fused_opt_states_bf16":
            raise ValueError("optimizer.implementation is 'fused_opt_states_bf16'; SgtmAdamW has moments in fp32")
        for group in config.param_groups:
            if unknown := sorted(set(group.optimizer_kwargs) - OPTIONS):
                raise ValueError(f"optimizer_kwargs has {unknown[0]!r}; SgtmAdamW takes {', '.join(sorted(OPTIONS))}")
        super().__init__(config, model_parts=model_parts)

    def _resolve_optimizer_factory(self, name: str) -> Callable[..., torch.optim.Optimizer]:
        (model,) = self.model_parts
        return lambda groups: SgtmAdamW(model, groups)


@dataclass(kw_only=True, slots=True)
class LabeledSource(HFDataSource):
    """A dataset of torchtitan, its sampling weight, and the applied label of all its documents."""

    label: str = "unlabeled"


class LabeledTextDataset(HuggingFaceTextDataset):
    """Packed sequences of documents with one label."""

    label: str

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for inputs, targets in super().__iter__():
            yield {**inputs, LABELS: self.label}, targets


class LabeledTextDataLoader(InterleavedHuggingFaceTextDataLoader):
    """Interleaves sources by weight, in sequences of one label each, which batches have as `sgtm_labels`.

    All ranks draw the sources in the same order, so that their micro-batches have as many sequences of each label.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(InterleavedHuggingFaceTextDataLoader.Config):
        sources: list[LabeledSource] = field(default_factory=list)

    def __init__(self, config: Config, **kwargs: Any):
        super().__init__(config, **kwargs)
        for dataset, source in zip(self.dataset._datasets, config.sources, strict=True):
            dataset.__class__, dataset.label = LabeledTextDataset, source.label
