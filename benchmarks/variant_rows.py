"""Rows of variants, in the form that benchmarks/recipes.py writes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from sgtm.sweep.table import LOSSES


def over_seeds(seeds: list[dict], losses: Sequence[str] = LOSSES) -> dict[str, float | None]:
    """Means and, as `LOSS_sd`, sample standard deviations over the seeds; None of losses that they lack."""
    row: dict[str, float | None] = {}
    for loss in losses:
        values = [seed[loss] for seed in seeds if seed.get(loss) is not None]
        row[loss] = statistics.fmean(values) if values else None
        row[f"{loss}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    return row


def variant_row(sweep: str, variant: str, seeds: list[dict], *, masks: bool, runs: int, tokens: int) -> dict[str, Any]:
    """Of a variant whose runs no sweep has trained; no compute ratios.

    seeds   of each its losses in nats per token, by the names in `LOSSES`
    masks   whether something can be removed
    runs    how many there were to be
    tokens  of the training of one
    """
    row = {"sweep": sweep, "variant": variant, "masks": masks, "trained": {}, **over_seeds(seeds)}
    return {**row, "finished": len(seeds), "runs": runs, "tokens": tokens, "seeds": seeds, "ratios": {}}
