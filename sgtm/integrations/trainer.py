"""What a Hugging Face `Trainer` needs to train a masked model: the label column and the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sgtm.integrations.binding import Binding, binding_of
from sgtm.integrations.collator import SgtmCollator
from sgtm.integrations.optimizer import SgtmAdamW

if TYPE_CHECKING:
    from transformers import Trainer

    Base = Trainer
else:
    Base = object

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


class SgtmTrainerMixin(Base):
    """`class MaskedTrainer(SgtmTrainerMixin, Trainer)`: trains a model of `apply_sgtm` with labels of `SgtmCollator`.

    The optimizer is `SgtmAdamW`, with the learning rate, betas, epsilon and decay of the arguments; alone, under DDP,
    FSDP2 and DeepSpeed (ZeRO 0 to 3, without an optimizer in its config).

    Raises ValueError in `__init__` for a model without masks, for a collator that adds no labels, for a DeepSpeed
    config with an `optimizer` section, which would replace ours, for optimizers other than AdamW, for FSDP1, and for
    several GPUs in one process.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._sgtm_binding()
        self._check_sgtm()
        self._step_ended = False

    def _sgtm_binding(self) -> Binding:
        assert self.model is not None
        return binding_of(self.model)

    def _check_sgtm(self) -> None:
        if not isinstance(self.data_collator, SgtmCollator):
            raise ValueError(
                f"data_collator is {type(self.data_collator).__name__}, which adds no labels; wrap it: "
                f"SgtmCollator(data_collator, masking)"
            )
        if self.data_collator.space != self._sgtm_binding().space:
            theirs, ours = self.data_collator.space.domains, self._sgtm_binding().space.domains
            raise ValueError(f"the collator has domains {theirs}, the model {ours}; give both the same masking")
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and "optimizer" in plugin.deepspeed_config:
            raise ValueError(
                "the DeepSpeed config has a section 'optimizer', which would update what the labels freeze: remove it, "
                "so that SgtmAdamW is used"
            )
        if self.optimizer is not None and not isinstance(self.optimizer, SgtmAdamW):
            raise ValueError(
                f"optimizers has {type(self.optimizer).__name__}, which updates what the labels freeze; leave it out, "
                f"or give an SgtmAdamW"
            )
        name = str(getattr(self.args.optim, "value", self.args.optim))
        if name not in OPTIMIZERS:
            raise ValueError(f"optim is {name!r}; SgtmAdamW stands in for {' and '.join(OPTIMIZERS)} alone")
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version != 2:
            raise ValueError("FSDP1 flattens the parameters, so that rows cannot be told apart; set fsdp_version to 2")
        if self.args.n_gpu > 1:
            raise ValueError(f"{self.args.n_gpu} GPUs in one process: start one process for each, with torchrun")

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        collator, columns = self.data_collator, self._signature_columns
        if isinstance(collator, SgtmCollator) and columns is not None and collator.column not in columns:
            columns.append(collator.column)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """`SgtmAdamW`; as in `Trainer`, norms and biases are not decayed."""
        if self.optimizer is None:
            source, args = self.model if model is None else model, self.args
            assert source is not None
            decayed = set(self.get_decay_parameter_names(source))
            parts: dict[bool, list[nn.Parameter]] = {True: [], False: []}
            for name, parameter in source.named_parameters():
                if parameter.requires_grad:
                    parts[name in decayed].append(parameter)
            decays = {True: args.weight_decay, False: 0.0}
            groups = [{"params": params, "weight_decay": decays[key]} for key, params in parts.items() if params]
            betas = (args.adam_beta1, args.adam_beta2)
            self.optimizer = SgtmAdamW(source, groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon)
        return self.optimizer

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch. The step before it has ended even where a scaler has skipped its update."""
        if self._step_ended:
            self._sgtm_binding().new_step()
        self._bind(model)
        loss = super().training_step(model, *args, **kwargs)
        self._step_ended = self.accelerator.sync_gradients
        return loss

    def _bind(self, model: nn.Module) -> None:
        wrapper = getattr(model, "optimizer", None)  # of a DeepSpeed engine
        inner = getattr(wrapper, "optimizer", wrapper)
        if isinstance(inner, SgtmAdamW) and not inner.bound:
            inner.bind(wrapper)
