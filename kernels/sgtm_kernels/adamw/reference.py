"""AdamW, the formula line by line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sgtm_kernels.adamw.op import Step, Tensors, WeightSlice


def prepare(slices: Sequence[WeightSlice], betas: tuple[float, float], eps: float) -> Step:
    beta1, beta2 = betas

    def step(tensors: Sequence[Tensors], counts: Sequence[int], lr: float, factor: float) -> None:
        for tensor, start, end, counter, decay in slices:
            weight, grad, exp_avg, exp_avg_sq = (t.view(-1)[start:end] for t in tensors[tensor])
            grad = grad * factor
            weight.mul_(1 - lr * decay)
            exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2 ** counts[counter])).add_(eps)
            weight.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1 ** counts[counter]))

    return step
