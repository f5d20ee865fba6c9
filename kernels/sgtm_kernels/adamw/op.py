"""AdamW on slices: what no slice covers is not touched.

An optimizer that must leave a group of weights bitwise alone leaves out its slices. Every slice has its own step count,
so that the bias correction of weights that were frozen for a while is that of the updates they have really had.
Promises (tests/kernels/test_adamw.py): all backends follow the paper's formula, and memory outside the slices keeps
every bit.

`prepare` does once what follows from the slices alone; each step then costs the host little. `adamw` is one step of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from sgtm_kernels.dispatch import pick


class WeightSlice(NamedTuple):
    """Elements `start:end` of one of the tensors of a step.

    tensor   position of the tensor among those of a step
    counter  position of its step count among those of a step
    decay    weight decay, decoupled
    """

    tensor: int
    start: int
    end: int
    counter: int
    decay: float


class Tensors(NamedTuple):
    """One tensor of a step, flattened, with its gradient and moments: contiguous, of one length and on one device.

    fp32; the backend `triton` also takes gradients in bf16 and fp16, in all tensors of a step the same.
    """

    weight: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


class Update(NamedTuple):
    """One slice to update in place, as views of its tensors: fp32 [n], as in `Tensors`.

    step   number of this update for the slice, from 1 (bias correction)
    decay  weight decay, decoupled
    """

    weight: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: int
    decay: float


Step = Callable[[Sequence[Tensors], Sequence[int], float, float], None]


def prepare(slices: Sequence[WeightSlice], betas: tuple[float, float], eps: float, backend: str = "torch") -> Step:
    """A function `(tensors, counts, lr, factor)` that updates these slices, in place, with `grad * factor`.

    slices   those of one tensor in order, without overlap
    tensors  at any addresses; a step may come with others than the last
    counts   number of this update by counter, from 1 (bias correction)
    factor   an fp32 number, 1.0 where gradients are not clipped. The product is rounded to fp32 before it is used, as
             if the gradient had been multiplied in place; `torch` does multiply the slices of the gradient in place.
    """
    return pick("adamw", backend).prepare(slices, betas, eps)


@torch.no_grad()
def adamw(
    updates: Sequence[Update],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    backend: str = "torch",
    factor: float = 1.0,
) -> None:
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019, algorithm 2 with the schedule inside `lr`).

    grad        = grad * factor
    weight     *= 1 - lr * decay
    exp_avg     = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * grad^2
    weight     -= lr * (exp_avg / (1 - beta1^step)) / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)
    """
    by_dtype: dict[torch.dtype, list[Update]] = {}
    for update in updates:
        by_dtype.setdefault(update.grad.dtype, []).append(update)
    for group in by_dtype.values():
        slices = [WeightSlice(i, 0, update.weight.numel(), i, update.decay) for i, update in enumerate(group)]
        step = prepare(slices, betas, eps, backend)
        step([Tensors(*update[:4]) for update in group], [update.step for update in group], lr, factor)
