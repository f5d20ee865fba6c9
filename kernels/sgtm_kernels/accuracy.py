"""Whether a result is as good as plain PyTorch's: the one comparison of tests, self-check and benchmarks.

The error budget is relative to torch's own error: both results are compared with PyTorch in a wider dtype. Where torch
happens to be exact, a few roundings of the largest value are allowed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Comparison(NamedTuple):
    """
    error          largest absolute difference to the exact result; NaN if a value is
    budget         largest error allowed
    rows_not_zero  rows that are 0 in the exact result and not in this one: a row of the last dimension, or a single
                   entry of a vector
    """

    error: float
    budget: float
    rows_not_zero: int

    @property
    def ok(self) -> bool:
        return self.error <= self.budget and not self.rows_not_zero


def compare(
    actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, factor: float = 2.0, roundings: float = 2.0
) -> Comparison:
    """Compare a result with plain PyTorch's.

    actual, plain  the op and plain PyTorch in one dtype; exact: PyTorch in a wider one; all of one shape
    factor         times torch's own largest error, plus `roundings` of the largest value in the dtype of `actual`
    """
    if not exact.numel():
        return Comparison(0.0, 0.0, 0)
    wide = exact.double()
    error, own = (float((x.double() - wide).abs().max()) for x in (actual, plain))
    budget = factor * own + roundings * torch.finfo(actual.dtype).eps * float(wide.abs().max())
    width = exact.shape[-1] if exact.dim() > 1 else 1
    masked = (exact.reshape(-1, width) == 0).all(-1)
    return Comparison(error, budget, int((actual.reshape(-1, width)[masked] != 0).any(-1).sum()))
