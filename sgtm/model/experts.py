"""A mixture of experts in place of an MLP: a router, and experts of which whole ones belong to groups.

The rows of a group in the router are updated as its in-side MLP weights are, with key `mlp_in.<group>`. A token's
choice is among the experts of the groups that are active for its label, and its softmax is over those that it chooses:
a retain token depends on no expert of a domain and on none of its rows in the router, in forward and backward pass. On
a token for which both groups are active, what the retain group's rows learn depends on the domain's experts, as it does
on its neurons in a dense model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from sgtm.masking.partition import LayerPartition
from sgtm.model.rows import mlp_in_bounds
from sgtm_kernels.experts import experts, route
from sgtm_kernels.linear import linear_in
from sgtm_kernels.plan import MaskPlan

if TYPE_CHECKING:
    from sgtm.masking.shape import ModelShape
    from sgtm.model.balance import Balance
    from sgtm.model.output_norms import OutputNorms


class Experts(nn.Module):
    """Top-k of the router's experts, their weights adding up to 1, and shared experts: SwiGLU without biases.

    router  [experts, D]
    w_in    [2 F (shared + experts), D]: for each expert its gates and its ups; shared experts first, then retain's
    w_out   [F (shared + experts), D]
    """

    def __init__(self, config: ModelShape, layer: LayerPartition, backend: str):
        super().__init__()
        self.per_token, self.shared, self.backend = config.experts_per_token, config.shared_experts, backend
        self.expert_bounds, self.bounds = layer.expert_bounds, layer.neuron_bounds
        self.in_bounds = mlp_in_bounds(layer, gated=True)
        self.router = nn.Parameter(torch.empty(self.expert_bounds[-1], config.hidden_size))
        self.w_in = nn.Parameter(torch.empty(self.in_bounds[-1], config.hidden_size))
        self.w_out = nn.Parameter(torch.empty(self.bounds[-1], config.hidden_size))

    def forward(
        self, x: torch.Tensor, plan: MaskPlan, norms: OutputNorms | None = None, balance: Balance | None = None
    ) -> torch.Tensor:
        """x [B, S, D] -> [B, S, D]"""
        logits = linear_in(x, self.router, None, plan, "mlp_in", self.expert_bounds, self.backend)
        weights, chosen = route(logits, self.per_token, plan, self.expert_bounds, self.backend)
        if balance is not None:
            balance.add(logits, chosen, plan, self.expert_bounds, self.backend)
        out = experts(
            x, weights, chosen, self.w_in, self.w_out, plan, self.expert_bounds, self.shared, self.backend
        )  # fmt: skip
        if norms is not None:
            norms.choices(chosen, plan, self.expert_bounds)
            norms.parts("mlp", out, len(self.bounds) - 1, lambda group: self._of_group(group, x, weights, chosen, plan))
        return out

    def _of_group(
        self, group: int, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, plan: MaskPlan
    ) -> torch.Tensor:
        """What a domain's experts add: those of others, and the shared ones, are not chosen."""
        start, end = self.expert_bounds[group : group + 2]
        others = (chosen < start) | (chosen >= end)
        bounds = (0, *(self.shared + bound for bound in self.expert_bounds[1:]))
        weights, chosen = weights.masked_fill(others, 0.0), (chosen + self.shared).masked_fill(others, bounds[-1])
        return experts(x, weights, chosen, self.w_in, self.w_out, plan, bounds, 0, self.backend)
