"""Modules of Hugging Face and torchtitan with masks: the same class but for `forward`, the same parameters and names.

Without a plan, which is outside training, `forward` is the module's own, without the removed groups.
`torch.compile` leaves the masked modules out of its graphs: what is between them is compiled.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sgtm.config.sections import MaskingConfig
from sgtm.integrations import ops
from sgtm.integrations.binding import Binding, Bound, BoundLayer, swapped
from sgtm.integrations.roles import Masked, owned_parameters
from sgtm.integrations.settings import space_of
from sgtm.masking.partition import Partition
from sgtm.masking.strategy import build_tables
from sgtm_kernels.embedding import embedding
from sgtm_kernels.norm import layer_norm
from sgtm_kernels.plan import MaskPlan


class MaskedLinear(Bound):
    layout: ops.Layout
    weight: nn.Parameter
    bias: nn.Parameter | None

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        plan = self.sgtm.plan_of(self)  # type: ignore[arg-type]
        if plan is not None:
            return ops.linear(x, self.weight, self.bias, plan, self.layout)
        if self.sgtm.removed and not self.layout.incoming:
            x = self.sgtm.without_removed(x, self.layout.bounds)
        return super().forward(x)  # type: ignore[misc]


class MaskedJoint(Bound):
    """A module of joint parameters, of which a label may or may not update all."""

    kind: str

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        plan = self.sgtm.plan_of(self)  # type: ignore[arg-type]
        return super().forward(x) if plan is None else self.masked(x, plan)  # type: ignore[misc]

    def masked(self, x: Tensor, plan: MaskPlan) -> Tensor:
        """The module's value, with the gradients of its parameters as the plan has them."""
        raise NotImplementedError


class MaskedLayerNorm(MaskedJoint):
    def masked(self, x: Tensor, plan: MaskPlan) -> Tensor:
        assert isinstance(self, nn.LayerNorm)
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # as autocast does
        return layer_norm(x, self.weight, self.bias, self.eps, plan, self.kind)


class MaskedRMSNorm(MaskedJoint):
    weight: nn.Parameter
    variance_epsilon: float

    def masked(self, x: Tensor, plan: MaskPlan) -> Tensor:
        """As in `LlamaRMSNorm`: x [B, S, ..., D], normalized in fp32."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return ops.scale(wide.to(x.dtype), self.weight, plan, self.kind)


class MaskedTorchRMSNorm(MaskedJoint):
    def masked(self, x: Tensor, plan: MaskPlan) -> Tensor:
        assert isinstance(self, nn.RMSNorm)
        return ops.rms_norm(x, self.weight, self.eps, plan, self.kind)


class MaskedEmbedding(MaskedJoint):
    def masked(self, x: Tensor, plan: MaskPlan) -> Tensor:
        """x int64 [B, S], or [1, S] of positions that all sequences share: each has labels of its own."""
        assert isinstance(self, nn.Embedding)
        ids = x if x.shape[0] == plan.batch else x.expand(plan.batch, -1)
        values = embedding(ids, self.weight, plan, self.kind)
        if self.padding_idx is None:
            return values
        return torch.where((ids == self.padding_idx)[..., None], values.detach(), values)


def mask_model(
    model: nn.Module, masking: MaskingConfig, partition: Partition, masked: list[Masked], layers: Iterable[nn.Module]
) -> Binding:
    """Swap the classes of the masked modules and of the layers in place, and leave their binding at `model.sgtm`."""
    space = space_of(masking)
    tables = build_tables(space, masking.strategy, masking.joint, masking.cross_domain, masking.overrides)
    binding = Binding(space, tables, partition, owned_parameters(model, masked))
    for module in masked:
        mask_module(module, binding)
    for layer in layers:
        mask_layer(layer, binding)
    model.sgtm = binding  # type: ignore[assignment]
    model.register_forward_pre_hook(binding.begin, with_kwargs=True)
    model.register_forward_hook(binding.end, always_call=True)
    return binding


def mask_module(masked: Masked, binding: Binding) -> None:
    """Swap the class of a module in place."""
    module, role = masked.module, masked.role
    mixin: type
    if role.owner is not None or role.kind == "head":
        mixin = MaskedLinear
        outputs = masked.owned["weight"].rows  # of the head
        inputs_first = isinstance(module, Conv1D)
        module.layout = ops.Layout(role.kind, masked.bounds or (0, outputs), role.parts, inputs_first)  # type: ignore[assignment]
    else:
        by_class = {nn.Embedding: MaskedEmbedding, nn.LayerNorm: MaskedLayerNorm, nn.RMSNorm: MaskedTorchRMSNorm}
        mixin = next((ours for cls, ours in by_class.items() if isinstance(module, cls)), MaskedRMSNorm)
        module.kind = role.kind  # type: ignore[assignment]
    swap_class(module, mixin, binding)


def mask_layer(layer: nn.Module, binding: Binding) -> None:
    """Swap the class of a transformer layer in place, so that it hands its plan to its checkpoint."""
    swap_class(layer, BoundLayer, binding)


def swap_class(module: nn.Module, mixin: type, binding: Binding) -> None:
    """Put `mixin` before the class of a module in place, under the name of that class."""
    module.sgtm = binding  # type: ignore[assignment]
    module.__class__ = swapped(mixin, type(module))  # type: ignore[arg-type]
