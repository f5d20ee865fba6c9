"""Collectives of a global step, as the engine configures DeepSpeed, and the bytes that they move.

Gradients are reduced in fp32 whatever the precision of the weights. ZeRO 0 and 1 reduce them once in a step, ZeRO 2 and
3 for every micro-batch. ZeRO 1 and 2 reduce by all-reduce and not by reduce-scatter (use_multi_rank_bucket_allreduce,
DeepSpeed's default), and each rank keeps its share. Scalars (norms, flags) are left out. What hpZ saves is not
counted: from its second gather in a step on, a weight moves inside the groups of `zero_hpz_partition_size` alone; here,
it always moves over all ranks.

tests/dist/test_plan.py counts the same bytes in runs on 2 and 4 ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from sgtm.config.schema import Config
from sgtm.plan.shapes import parameter_sizes
from sgtm.plan.zero3 import Limits, gathers, persistent

ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER = "all-reduce", "reduce-scatter", "all-gather"


@dataclass(frozen=True)
class Collective:
    """One kind of collective of a step: `times` times `elements` of `width` bytes; `elements` of the whole tensor."""

    kind: str
    what: str
    elements: int
    width: int
    times: int = 1

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends in a step."""
        return self.times * ring_bytes(self.kind, self.elements * self.width, ranks)


def ring_bytes(kind: str, size: int, ranks: int) -> float:
    """Bytes each rank sends in a ring collective over `size` bytes, the whole tensor on one rank (Patarasuk and Yuan,
    2009): an all-reduce is a reduce-scatter and an all-gather."""
    passes = {ALL_REDUCE: 2, REDUCE_SCATTER: 1, ALL_GATHER: 1}[kind]
    return passes * size * (ranks - 1) / ranks


def width_of(config: Config) -> int:
    """Bytes of a weight."""
    return {"bf16": 2, "fp32": 4}[config.train.precision]


def padded(size: int, ranks: int) -> int:
    """Elements of a flat tensor that DeepSpeed cuts into equal parts, each on a border of 4 bytes in bf16."""
    return ceil(size / (2 * ranks)) * 2 * ranks


def split(sizes, ranks: int) -> int:
    """Elements of parameters that are each cut into equal parts for the ranks (ZeRO-3)."""
    return sum(ceil(size / ranks) * ranks for size in sizes)


def collectives(config: Config, stage: int, ranks: int, limits: Limits | None = None) -> list[Collective]:
    """Of one global step. Raises ValueError where the step does not divide by the ranks."""
    limits, sizes, width = limits or Limits(), parameter_sizes(config.model), width_of(config)
    accumulation = config.accumulation(ranks)
    if ranks == 1:
        return []
    total = sum(sizes.values())
    if stage == 0 and width == 4:
        return [Collective(ALL_REDUCE, "gradients", total, 4)]
    if stage < 3:
        reduced = Collective(ALL_REDUCE, "gradients", total, 4, accumulation if stage == 2 else 1)
        return [reduced, Collective(ALL_GATHER, "weights", padded(total, ranks), width)]
    kept = persistent(sizes, limits)
    gathered = split((sizes[name] for name in gathers(config.model, limits).names), ranks)
    return [
        Collective(REDUCE_SCATTER, "gradients", split(sizes.values(), ranks), 4, accumulation),
        Collective(ALL_GATHER, "weights", gathered, width, accumulation),
        Collective(ALL_GATHER, "persistent weights", split((sizes[name] for name in kept), ranks), width),
    ]
