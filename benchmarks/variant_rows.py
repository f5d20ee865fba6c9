"""The row of a variant whose runs no sweep has trained, in the form that benchmarks/recipes.py writes."""

from __future__ import annotations

import statistics
from typing import Any

from sgtm.sweep.table import LOSSES


def variant_row(sweep: str, variant: str, seeds: list[dict], *, masks: bool, runs: int, tokens: int) -> dict[str, Any]:
    """Means and sample standard deviations over the seeds, None of losses that they lack; no compute ratios.

    seeds   of each its losses in nats per token, by the names in `LOSSES`
    masks   whether something can be removed
    runs    how many there were to be
    tokens  of the training of one
    """
    row: dict[str, Any] = {"sweep": sweep, "variant": variant, "masks": masks, "trained": {}}
    for loss in LOSSES:
        values = [seed[loss] for seed in seeds if loss in seed]
        row |= {loss: statistics.fmean(values) if values else None}
        row |= {f"{loss}_sd": statistics.stdev(values) if len(values) > 1 else None}
    return {**row, "finished": len(seeds), "runs": runs, "tokens": tokens, "seeds": seeds, "ratios": {}}
