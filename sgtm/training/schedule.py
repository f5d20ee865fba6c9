"""The learning rate: a pure function of the step, so that resuming needs no state of it."""

from __future__ import annotations

import math

from sgtm.config.schema import OptimizerConfig


def learning_rate(step: int, optimizer: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of the global step `step` (from 0).

    Linear from `warmup_start * lr` at step 0 to `lr` at the end of the warm-up, then a half cosine down to
    `final_lr * lr`, which the step after the last (`total_steps`) would have.
    """
    peak, warmup = optimizer.lr, optimizer.warmup(total_steps)
    if step < warmup:
        return peak * (optimizer.warmup_start + (1 - optimizer.warmup_start) * step / warmup)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return peak * (optimizer.final_lr + (1 - optimizer.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))
