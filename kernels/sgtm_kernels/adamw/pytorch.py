"""AdamW through torch's fused multi-tensor kernel (CPU and CUDA): one pass over the memory of the slices.

Slices are handed over as they come and never merged, so that the arithmetic of a slice (where its vectorised part ends)
does not depend on whether its neighbour is frozen. One call for each weight decay, in practice two for all weights.
The kernel is called past `torch.optim`, which would sort hundreds of tensors by device and dtype in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sgtm_kernels.adamw.op import Step, Tensors, WeightSlice


def prepare(slices: Sequence[WeightSlice], betas: tuple[float, float], eps: float) -> Step:
    return _Step(slices, betas, eps)


class _Step:
    """Views of weights and moments are kept while these stay where they are; gradients are often new in every step."""

    def __init__(self, slices: Sequence[WeightSlice], betas: tuple[float, float], eps: float):
        self.betas, self.eps = betas, eps
        self.borders: dict[int, list[int]] = {}
        for tensor, start, end, _, _ in slices:
            self.borders.setdefault(tensor, []).extend((start, end))
        order = [s for tensor in self.borders for s in slices if s.tensor == tensor]
        self.by_decay: dict[float, list[int]] = {}
        for index, piece in enumerate(order):
            self.by_decay.setdefault(piece.decay, []).append(index)
        self.counters = [piece.counter for piece in order]
        self.addresses: list[int] = []
        self.views: list[list[torch.Tensor]] = []  # of the weights, of either moment

    def __call__(self, tensors: Sequence[Tensors], counts: Sequence[int], lr: float, factor: float) -> None:
        if not self.borders:
            return
        weights, grads, *moments = zip(*tensors, strict=True)
        addresses = [t.data_ptr() for column in (weights, *moments) for t in column]
        if addresses != self.addresses:
            self.views = [self._pieces([t.detach() for t in column]) for column in (weights, *moments)]
            self.addresses = addresses
        pieces = self._pieces(grads)
        if factor != 1.0:
            torch._foreach_mul_(pieces, factor)
        # One fp32 scalar for each count, on the device of the weights; the slices with that count share it.
        numbers = torch.tensor(counts, dtype=torch.float32, device="cpu")
        scalars = numbers.to(weights[0].device, non_blocking=True).unbind()
        columns = (*self.views, pieces, list(map(scalars.__getitem__, self.counters)))
        for decay, indices in self.by_decay.items():
            weight, exp_avg, exp_avg_sq, grad, step = (list(map(column.__getitem__, indices)) for column in columns)
            torch._fused_adamw_(
                weight,
                grad,
                exp_avg,
                exp_avg_sq,
                [],
                step,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=lr,
                weight_decay=decay,
                eps=self.eps,
                maximize=False,
            )

    def _pieces(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        pieces: list[torch.Tensor] = []
        for tensor, borders in self.borders.items():
            of = tensors[tensor]
            if borders == [0, of.numel()]:
                pieces.append(of)  # needs no view
            elif len(borders) <= 4:  # a weight's rows of two groups
                flat = of.view(-1)
                pieces += [flat[start:end] for start, end in zip(borders[::2], borders[1::2], strict=True)]
            else:
                pieces += of.view(-1).tensor_split(borders)[1::2]
        return pieces
