"""AdamW on slices: what is not named in a call is not touched.

An optimizer that must leave a group of weights bitwise alone does not pass its slices. Every slice brings its own step
count, so that the bias correction of weights that were frozen for a while is that of the updates they have really had.
Promises (tests/kernels/test_adamw.py): all backends follow the paper's formula, and memory outside the slices, and
slices not passed, keep every bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sgtm_kernels.dispatch import pick


class Update(NamedTuple):
    """One slice to update in place; the tensors are fp32 [n], contiguous, on one device.

    The backend `triton` also takes gradients in bf16 and fp16.

    step   number of this update for the slice, from 1 (bias correction)
    decay  weight decay, decoupled
    """

    weight: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: int
    decay: float


@torch.no_grad()
def adamw(updates: Sequence[Update], lr: float, betas: tuple[float, float], eps: float, backend: str = "runs") -> None:
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019, algorithm 2 with the schedule inside `lr`).

    weight     *= 1 - lr * decay
    exp_avg     = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * grad^2
    weight     -= lr * (exp_avg / (1 - beta1^step)) / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)
    """
    if updates:
        pick("adamw", backend).adamw(updates, lr, betas, eps)
