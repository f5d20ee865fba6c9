"""Scaling a group's columns by a factor per label: what `active` and `route` come down to."""

from __future__ import annotations

import torch

from sgtm_kernels.plan import MAX_SLICES, MaskPlan


def scale_columns_(x: torch.Tensor, plan: MaskPlan, start: int, end: int, by_label: tuple[float, ...]) -> None:
    """Multiply `x[t, start:end]` by the factor of token t's label, in place; where it is 0 the result is exactly 0.

    x [tokens, columns]. Blocks with factor 1 are not touched.
    """
    if len(plan.label_runs) > MAX_SLICES:
        if any(by_label[run.label] != 1 for run in plan.label_runs):
            weights = plan.token_weights(by_label, x)[:, None]
            x[:, start:end] = torch.where(weights == 0, 0.0, x[:, start:end] * weights)
        return
    for run in plan.label_runs:
        factor = by_label[run.label]
        if factor == 0:
            x[run.start : run.end, start:end] = 0
        elif factor != 1:
            x[run.start : run.end, start:end] *= factor


def products(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(x * y for x, y in zip(a, b, strict=True))
