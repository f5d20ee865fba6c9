"""SGTM in Hugging Face models and trainers: `apply_sgtm`, the label column, the optimizer and `ablate`.

    model = apply_sgtm(AutoModelForCausalLM.from_config(config), {"domains": ["bio"], "forget_heads": 1})

Promises (tests/unit/test_integrations_hf.py): logits in training mode are bit for bit the plain model's where no group
is inactive; gradients are those of our own transformer with the same weights; and non-interference, section 3 of
docs/method.md, bit for bit for every family.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from sgtm.config.sections import MaskingConfig
from sgtm.integrations.binding import ablate, binding_of, take_off, unwrapped
from sgtm.integrations.collator import SgtmCollator
from sgtm.integrations.families import blocks_of, masked_modules, partition_of
from sgtm.integrations.modules import mask_model
from sgtm.integrations.optimizer import SgtmAdamW
from sgtm.integrations.range_adamw import is_sharded
from sgtm.integrations.settings import check_masking, space_of
from sgtm.integrations.trainer import SgtmTrainerMixin

__all__ = ["SgtmAdamW", "SgtmCollator", "SgtmTrainerMixin", "ablate", "apply_sgtm", "without_domains"]

Model = TypeVar("Model", bound=PreTrainedModel)


def apply_sgtm(model: Model, masking: MaskingConfig | Mapping[str, Any]) -> Model:
    """Mask a Hugging Face causal LM in place and return it: the same parameters, names, state dict and config.

    masking  section `masking` of a config, or its keys (docs/config.md). A domain has the last heads and neurons of
             each layer, and the last domain the very last; with grouped-query attention it has whole KV groups.

    In training the model takes `sgtm_labels`, one applied label for each sequence, as a name or a number; labels
    `open:<domain>` too. Without gradients it is the plain model. Call it before `deepspeed.initialize` and before any
    wrapper.

    Raises ValueError for an unknown architecture, for modules or parameters that the masks would miss, for groups that
    do not fit, for settings that need our own transformer (`domain_embedding`, `certify`), and if it is masked already.
    """
    if hasattr(model, "sgtm"):
        raise ValueError("the model is masked already; call apply_sgtm once")
    config = check_masking(masking)
    partition = partition_of(model, config, space_of(config))
    mask_model(model, config, partition, masked_modules(model, partition), blocks_of(model))
    return model


def without_domains(model: PreTrainedModel, domains: Iterable[str]) -> PreTrainedModel:
    """A plain model without the groups of these domains: weights and in-side biases of their heads and neurons are 0.

    It computes what `ablate` does, to the bit. `save_pretrained` writes it; the masked model is left as it is.
    Raises ValueError for an unknown domain, and where ZeRO-3 or FSDP2 has left only a part of the
    weights here.
    """
    binding = binding_of(model)
    groups = {binding.partition.groups[group] for group in binding.groups_of(domains)}
    if any(hasattr(parameter, "ds_id") or is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError(
            "the weights are sharded by ZeRO-3 or FSDP2: call save_pretrained, load the folder in one process, call "
            "apply_sgtm with the same masking, and then without_domains"
        )
    plain: Any = copy.deepcopy(unwrapped(model))
    take_off(plain)
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for name, owned in binding.owned.items():
            for key, start, end in owned.ranges():
                if key.partition(".")[2] in groups:
                    parameters[name].narrow(owned.dim, start, end - start).zero_()
    return plain
