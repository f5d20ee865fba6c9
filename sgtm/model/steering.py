"""Preventative steering: a direction is added to the residual stream after a block (Chen et al., arXiv 2507.21509).

x_t + strength * v for every token t that the tables steer (`Tables.steered`): in training those of the applied label
`forget:<domain>`, in an evaluation all, or none where the domain is removed. v [D] is the difference of mean
activations on the domain's text and on retain text (sgtm/model/direction.py), so that strength is in units of it.

v is a constant: it is no parameter, no buffer and in no checkpoint, and the gradient of x passes as it is. No bit of
the other tokens changes. It is added between two blocks, outside of what is compiled or computed again in the backward
pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sgtm.config.schema import Config
from sgtm.model.direction import Direction, layer_of
from sgtm_kernels.plan import MaskPlan

if TYPE_CHECKING:
    from sgtm.model.output_norms import OutputNorms


class Steering:
    """What is added, after which block.

    direction  fp32 [D], not 0
    group      of the domain, in the tables of the run
    """

    def __init__(self, direction: torch.Tensor, layer: int, strength: float, group: int):
        direction = direction.detach().float().cpu()
        self.layer, self.strength, self.group = layer, strength, group
        self._vector, self._unit = strength * direction, direction / direction.norm()
        self._copies: dict[tuple[torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    @classmethod
    def of(cls, config: Config, direction: Direction | None) -> Steering | None:
        """None without a direction."""
        if direction is None:
            return None
        layer = layer_of(config, direction)
        vector = torch.from_numpy(direction.vectors[layer])
        return cls(vector, layer, config.steering.strength, config.space.group_of(direction.domain))

    def add(self, x: torch.Tensor, plan: MaskPlan, norms: OutputNorms | None = None) -> torch.Tensor:
        """The residual stream [B, S, D] after the block, with the direction added in the dtype of x.

        norms  takes the projections on the unit direction, before anything is added
        """
        vector, unit = self._on(x)
        if norms is not None:
            norms.project(x, unit)
        by_label = tuple(row[self.group] for row in plan.tables.steered)
        if not by_label or self.strength == 0 or not any(by_label[label] for label in plan.present):
            return x
        if all(by_label[label] for label in plan.present):
            return x + vector
        steered = plan.token_weights(by_label, x).bool().view(plan.batch, plan.seq_len, 1)
        return _AddWhere.apply(x, vector, steered)

    def _on(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is added, in the dtype of x, and the unit vector, fp32; copied to the device of x once."""
        key = x.dtype, x.device
        if key not in self._copies:
            with torch.inference_mode(False):
                self._copies[key] = self._vector.to(x.device, x.dtype), self._unit.to(x.device)
        return self._copies[key]


class _AddWhere(torch.autograd.Function):
    """x + vector at the chosen tokens, x at the others; the gradient of x is that of the result, to the bit."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, vector: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return torch.where(chosen, x + vector, x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient, None, None
