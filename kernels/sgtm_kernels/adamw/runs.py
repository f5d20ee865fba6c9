"""AdamW through torch's fused multi-tensor kernel (CPU and CUDA): one pass over the memory of the slices.

Slices are handed over as they come and never merged, so that the arithmetic of a slice (where its vectorised part ends)
does not depend on whether its neighbour is frozen. One call for each weight decay, in practice two for all weights.
"""

from __future__ import annotations

import torch
from torch.optim.adamw import adamw as torch_adamw


def prepare(slices, betas, eps):
    return _Step(slices, betas, eps)


class _Step:
    """Views of weights and moments are kept while these stay where they are; gradients are often new in every step."""

    def __init__(self, slices, betas, eps):
        self.betas, self.eps = betas, eps
        self.borders: dict[int, list[int]] = {}
        for tensor, start, end, _, _ in slices:
            self.borders.setdefault(tensor, []).extend((start, end))
        order = [s for tensor in self.borders for s in slices if s.tensor == tensor]
        self.by_decay: dict[float, list[int]] = {}
        for place, piece in enumerate(order):
            self.by_decay.setdefault(piece.decay, []).append(place)
        self.counters = [piece.counter for piece in order]
        self.addresses: list[int] = []
        self.kept: list[list[torch.Tensor]] = []

    def __call__(self, tensors, counts, lr, factor):
        addresses = [t.data_ptr() for group in tensors for t in (group[0], *group[2:])]
        if addresses != self.addresses:
            self.kept = [self._pieces([group[part] for group in tensors]) for part in (0, 2, 3)]
            self.addresses = addresses
        weights, exp_avgs, exp_avg_sqs = self.kept
        grads = self._pieces([group[1] for group in tensors])
        if factor != 1.0 and grads:
            torch._foreach_mul_(grads, factor)
        for decay, places in self.by_decay.items():
            # torch counts the step up before it uses it, one fp32 scalar for each slice, on the device of the weights
            steps = torch.tensor([counts[self.counters[place]] - 1.0 for place in places])
            torch_adamw(
                [weights[place] for place in places],
                [grads[place] for place in places],
                [exp_avgs[place] for place in places],
                [exp_avg_sqs[place] for place in places],
                [],
                list(steps.to(weights[0].device, non_blocking=True).unbind()),
                fused=True,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=lr,
                weight_decay=decay,
                eps=self.eps,
                maximize=False,
            )

    def _pieces(self, tensors) -> list[torch.Tensor]:
        pieces = []
        for tensor, borders in self.borders.items():
            pieces += tensors[tensor].detach().view(-1).tensor_split(borders)[1::2]
        return pieces
