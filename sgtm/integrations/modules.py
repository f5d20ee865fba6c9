"""Modules of Hugging Face with masks: the same class but for `forward`, the same parameters, names and state dict.

Without a plan, which is outside training, `forward` is the module's own, without the removed groups.
`torch.compile` leaves the masked modules out of its graphs: what is between them is compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sgtm.integrations import ops
from sgtm.integrations.binding import Binding, Bound, BoundLayer, swapped
from sgtm.integrations.families import Masked
from sgtm_kernels.embedding import embedding
from sgtm_kernels.norm import layer_norm


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


class MaskedLayerNorm(Bound):
    kind: str

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        plan = self.sgtm.plan_of(self)  # type: ignore[arg-type]
        if plan is None:
            return super().forward(x)  # type: ignore[misc]
        assert isinstance(self, nn.LayerNorm)
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # as autocast does
        return layer_norm(x, self.weight, self.bias, self.eps, plan, self.kind)


class MaskedRMSNorm(Bound):
    kind: str
    weight: nn.Parameter
    variance_epsilon: float

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """As in `LlamaRMSNorm`: x [B, S, ..., D], normalized in fp32."""
        plan = self.sgtm.plan_of(self)  # type: ignore[arg-type]
        if plan is None:
            return super().forward(x)  # type: ignore[misc]
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return ops.scale(wide.to(x.dtype), self.weight, plan, self.kind)


class MaskedEmbedding(Bound):
    kind: str

    @torch.compiler.disable
    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [B, S], or [1, S] of positions that all sequences share: each has labels of its own."""
        plan = self.sgtm.plan_of(self)  # type: ignore[arg-type]
        if plan is None:
            return super().forward(ids)  # type: ignore[misc]
        assert isinstance(self, nn.Embedding)
        if ids.shape[0] != plan.batch:
            ids = ids.expand(plan.batch, -1)
        values = embedding(ids, self.weight, plan, self.kind)
        if self.padding_idx is None:
            return values
        return torch.where((ids == self.padding_idx)[..., None], values.detach(), values)


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
        by_class = {nn.Embedding: MaskedEmbedding, nn.LayerNorm: MaskedLayerNorm}
        mixin = by_class.get(type(module), MaskedRMSNorm)
        module.kind = role.kind  # type: ignore[assignment]
    _swap(module, mixin, binding)


def mask_layer(layer: nn.Module, binding: Binding) -> None:
    """Swap the class of a transformer layer in place, so that it hands its plan to its checkpoint."""
    _swap(layer, BoundLayer, binding)


def _swap(module: nn.Module, mixin: type, binding: Binding) -> None:
    module.sgtm = binding  # type: ignore[assignment]
    module.__class__ = swapped(mixin, type(module))  # type: ignore[arg-type]
