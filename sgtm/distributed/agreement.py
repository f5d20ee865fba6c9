"""What all ranks agree on before an update: the gradient's norm, whether it is finite, and the stop flag.

Each step does one all-reduce of two numbers and one read of the device. DeepSpeed would reduce and read a norm, an
overflow flag and a clip coefficient separately (sgtm/distributed/takeover.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

PIECE = 2**16  # elements; a CPU sums the squares of a tensor in fp32 one by one, and of 7e7 is off by 2e-3


def never() -> bool:
    return False


class Agreement:
    """Of the last step, the same on all ranks:

    norm      global L2 norm of the gradient before clipping; infinite where it is not finite
    finite    whether it is
    stopping  whether the stop flag was set on any rank

    stop  the stop flag of this rank, read in every step
    """

    def __init__(self, device: torch.device, ranks: int):
        self.device, self.ranks = device, ranks
        self.stop: Callable[[], bool] = never
        self.norm, self.finite, self.stopping = 0.0, True, False

    def flag(self) -> torch.Tensor:
        """1 if this rank's stop flag is set, else 0; fp32 [1] on the device."""
        return torch.full((1,), float(self.stop()), device=self.device)

    def reach(self, gradients: Sequence[torch.Tensor], flags: torch.Tensor | None = None) -> float:
        """The norm; a collective call.

        gradients  this rank's share of the gradient, in any pieces
        flags      sum of `flag` over the ranks, where it is reduced already and `gradients` are all of them
        """
        if self.device.type == "cpu":
            gradients = [piece for gradient in gradients for piece in gradient.reshape(-1).split(PIECE)]
        return self.reach_by(torch.stack(torch._foreach_norm(gradients)), flags)

    def reach_by(self, norms: torch.Tensor, flags: torch.Tensor | None = None) -> float:
        """As `reach`, by the norms of the pieces."""
        numbers = torch.cat([norms.double().square().sum().view(1), self.flag() if flags is None else flags])
        if self.ranks > 1 and flags is None:
            dist.all_reduce(numbers)
        squares, stopping = numbers.tolist()
        self.finite, self.stopping = math.isfinite(squares), stopping > 0
        self.norm = math.sqrt(squares) if self.finite else math.inf
        return self.norm
