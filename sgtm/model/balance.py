"""The loss that balances the experts of a layer, added to the loss of a micro-batch.

In a layer, the tokens of label l that have a target make choices among the E_l experts of the groups that are active
for l. f_i is the share of these choices that fell on expert i, a constant, and P_i the mean of its probability. With

    B_l = E_l sum_i f_i P_i      (Switch Transformer, arXiv 2101.03961, equations 4 to 6)

a micro-batch adds `weight` times `scale` times the sum of n_l B_l over its labels and the layers, where n_l is the
number of these tokens and `scale` one divided by the targets of the global step. The micro-batches and ranks of a step
thus add, for each layer, `weight` times the mean of B_l over the tokens of the global step, as the loss is a mean. f
and P are those of a micro-batch: each one is balanced by itself, which is all that its size changes.

Experts that l may not update have another f: `balance` in kernels/sgtm_kernels/experts/op.py says which. No token of
another label is in B_l, and a group that is inactive for l has neither part in it nor a gradient from it. The gradient
passes through the masks of the router, so that rows that l may not update get exactly 0.

Evaluations, attacks and unlearning have no such loss: it belongs to a training step (sgtm/training/step.py).
"""

from __future__ import annotations

import torch

from sgtm.data.batch import IGNORE
from sgtm_kernels.experts import balance
from sgtm_kernels.plan import MaskPlan


class Balance:
    """Sums the loss over the layers of one forward pass; targets int64 [B, S].

    What comes after `added` is computed, and not added: activation checkpointing computes blocks again.
    """

    def __init__(self, targets: torch.Tensor):
        self._counted = targets != IGNORE
        self._layers: list[torch.Tensor] = []
        self._open = True

    def add(
        self, logits: torch.Tensor, chosen: torch.Tensor, plan: MaskPlan, bounds: tuple[int, ...], backend: str
    ) -> None:
        """Add a layer's; arguments as of `sgtm_kernels.experts.balance`."""
        loss = balance(logits, chosen, self._counted, plan, bounds, backend)
        if self._open:
            self._layers.append(loss)

    def added(self, loss: torch.Tensor, factor: float) -> torch.Tensor:
        """The loss, a scalar of unchanged value, with the gradient of `factor` times the layers' sum besides its own;
        not finite where that sum is not."""
        layers, self._layers, self._open = self._layers, [], False
        extra = factor * sum(layers, loss.new_zeros(()))
        return loss + (extra - extra.detach())
