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


class GradientNorm:
    """Of the last step, the same on all ranks:

    norms     L2 norm by owner of the gradient before clipping; infinite where it is not finite. One owner of all
              weights, unless `owners` is more (sgtm/model/rows.py)
    stopping  whether the stop flag was set on any rank

    stop  the stop flag of this rank, read in every step
    """

    def __init__(self, device: torch.device, ranks: int, owners: int = 1):
        self.device, self.ranks = device, ranks
        self.stop: Callable[[], bool] = never
        self.norms, self.stopping = [0.0] * owners, False

    @property
    def norm(self) -> float:
        """Global norm; infinite where any owner's is."""
        return math.hypot(*self.norms)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.norm)

    def flag(self) -> torch.Tensor:
        """1 if this rank's stop flag is set, else 0; fp32 [1] on the device."""
        return torch.full((1,), float(self.stop()), device=self.device)

    def reduce(
        self,
        gradients: Sequence[torch.Tensor],
        flags: torch.Tensor | None = None,
        owners: Sequence[int] | None = None,
    ) -> float:
        """The global norm; a collective call.

        gradients  this rank's share of the gradient, in any pieces
        flags      sum of `flag` over the ranks, where it is reduced already and `gradients` are all of them
        owners     of each piece; None: one owns all
        """
        pieces = list(gradients)
        if self.device.type == "cpu":
            splits = [gradient.reshape(-1).split(PIECE) for gradient in gradients]
            if owners is not None:
                owners = [owner for owner, split in zip(owners, splits, strict=True) for _ in split]
            pieces = [piece for split in splits for piece in split]
        if not pieces:  # a rank without a share
            pieces, owners = [torch.zeros(1, device=self.device)], None if owners is None else [0]
        return self.reduce_norms(torch.stack(torch._foreach_norm(pieces)), flags, owners)

    def reduce_norms(
        self, norms: torch.Tensor, flags: torch.Tensor | None = None, owners: Sequence[int] | None = None
    ) -> float:
        """As `reduce`, by the norms of the pieces."""
        squares = norms.double().square()
        if owners is None:
            squares = squares.sum().view(1)
        else:
            index = torch.tensor(owners, device="cpu").to(self.device, non_blocking=True)
            squares = squares.new_zeros(len(self.norms)).index_add_(0, index, squares)
        numbers = torch.cat([squares, self.flag() if flags is None else flags])
        if self.ranks > 1 and flags is None:
            dist.all_reduce(numbers)
        *by_owner, stopping = numbers.tolist()
        self.norms = [math.sqrt(square) if math.isfinite(square) else math.inf for square in by_owner]
        self.stopping = stopping > 0
        return self.norm
