"""What all ranks agree on before an update: the norm of the gradient, whether it is finite, and whether to stop.

One all-reduce of two numbers in each step, and one read of the device, which is the step's only one. DeepSpeed reduces
and reads its own norm, an overflow flag and a clip coefficient instead, each by itself (sgtm/distributed/takeover.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist


def never() -> bool:
    return False


class Agreement:
    """Of the last step: `norm`, global L2 norm before clipping, infinite where it is not `finite`; `stopping`, whether
    any rank wanted to stop. All ranks the same.

    stop  whether this rank wants to stop, asked in every step
    """

    def __init__(self, device: torch.device, ranks: int):
        self.device, self.ranks = device, ranks
        self.stop: Callable[[], bool] = never
        self.norm, self.finite, self.stopping = 0.0, True, False

    def wish(self) -> torch.Tensor:
        """1 if this rank wants to stop, else 0; fp32 [1] on the device."""
        return torch.full((1,), float(self.stop()), device=self.device)

    def reach(self, gradients: Sequence[torch.Tensor], wishes: torch.Tensor | None = None) -> float:
        """The norm; a collective call.

        gradients  this rank's share of the gradient, in any pieces
        wishes     sum of `wish` over the ranks, where it has been reduced already and `gradients` are all of them
        """
        return self.reach_by(torch.stack(torch._foreach_norm(gradients)), wishes)

    def reach_by(self, norms: torch.Tensor, wishes: torch.Tensor | None = None) -> float:
        """As `reach`, by the norms of the pieces."""
        numbers = torch.cat([norms.double().square().sum().view(1), self.wish() if wishes is None else wishes])
        if self.ranks > 1 and wishes is None:
            dist.all_reduce(numbers)
        squares, stopping = numbers.tolist()
        self.finite, self.stopping = math.isfinite(squares), stopping > 0
        self.norm = math.sqrt(squares) if self.finite else math.inf
        return self.norm
