"""Collectives of a global step, as the engine configures DeepSpeed, and the bytes that they move.

Gradients are reduced in `distributed.communication` whatever the precision of the weights. ZeRO 0 and 1 reduce them
once in a step, ZeRO 2 and 3 for every micro-batch. The bf16 optimizer of ZeRO 0 and 1 and ZeRO 3 reduce-scatter;
DeepSpeed's ZeRO 1 and 2 reduce each share to its owner, which moves the same bytes, or all-reduce where shares are
small. Scalars (norms, flags) are left out. What hpZ saves is not counted: from its second gather in a step on, a weight
moves inside the groups of `zero_hpz_partition_size` alone; here, it always moves over all ranks.

tests/dist/test_estimate.py counts the same bytes in runs on 2 and 4 ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from sgtm.config.schema import Config
from sgtm.estimate.shapes import parameter_sizes
from sgtm.estimate.zero3 import Limits, gathers, persistent

ALL_REDUCE, REDUCE, REDUCE_SCATTER, ALL_GATHER = "all-reduce", "reduce", "reduce-scatter", "all-gather"

PASSES = {ALL_REDUCE: 2, REDUCE: 1, REDUCE_SCATTER: 1, ALL_GATHER: 1}
"""How often a ring sends the tensor on."""
WIDTHS = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Collective:
    """A collective of a step: `times` times `elements` of `width` bytes; `elements` of the whole tensor.

    overlapped  whether the ranks compute meanwhile
    """

    collective: str
    what: str
    elements: int
    width: int
    times: int = 1
    overlapped: bool = False

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends in a step: elements x width x times x passes x (ranks - 1) / ranks."""
        return self.times * ring_bytes(self.collective, self.elements * self.width, ranks)

    @property
    def passes(self) -> int:
        return PASSES[self.collective]


def ring_bytes(collective: str, size: int, ranks: int) -> float:
    """Bytes each rank sends in a ring collective over `size` bytes, the whole tensor on one rank (Patarasuk and Yuan,
    2009): an all-reduce is a reduce-scatter and an all-gather. In a reduce every rank but one sends the tensor on: the
    mean."""
    return PASSES[collective] * size * (ranks - 1) / ranks


def width_of(config: Config) -> int:
    """Bytes of a weight."""
    return WIDTHS[config.train.precision]


def sent_width(config: Config) -> int:
    """Bytes of an element of a gradient on its way."""
    return WIDTHS[config.distributed.communication]


def is_bf16_optimizer(config: Config, stage: int) -> bool:
    """Whether DeepSpeed's bf16 optimizer runs: in bf16 for ZeRO 0 and 1, unless the optimizer is the host's."""
    return config.train.precision == "bf16" and stage < 2 and not config.distributed.offload_optimizer


def padded(size: int, ranks: int) -> int:
    """Elements of a flat tensor that DeepSpeed cuts into equal parts, each on a border of 4 bytes in bf16."""
    return ceil(size / (2 * ranks)) * 2 * ranks


def split(sizes, ranks: int) -> int:
    """Elements of parameters that are each cut into equal parts for the ranks (ZeRO-3)."""
    return sum(ceil(size / ranks) * ranks for size in sizes)


def collectives(config: Config, stage: int, ranks: int, limits: Limits | None = None) -> list[Collective]:
    """Of one global step. Raises ValueError where the step does not divide by the ranks."""
    limits, sizes, width = limits or Limits(), parameter_sizes(config), width_of(config)
    accumulation = config.accumulation(ranks)
    if ranks == 1:
        return []
    total, sent = sum(sizes.values()), sent_width(config)
    if stage == 0 and width == 4:
        return [Collective(ALL_REDUCE, "gradients", total, sent)]
    if is_bf16_optimizer(config, stage):
        whole = padded(total, ranks)
        return [Collective(REDUCE_SCATTER, "gradients", whole, sent), Collective(ALL_GATHER, "weights", whole, width)]
    if stage < 3:
        times = accumulation if stage == 2 else 1
        collective = REDUCE if config.distributed.reduces_to_owners(total, ranks) else ALL_REDUCE
        reduced = Collective(collective, "gradients", total, sent, times, overlapped=stage == 2)
        return [reduced, Collective(ALL_GATHER, "weights", padded(total, ranks), width)]
    persistent_names = persistent(sizes, limits)
    gathered = split((sizes[name] for name in gathers(config, limits).names), ranks)
    whole = split((sizes[name] for name in persistent_names), ranks)
    return [
        Collective(REDUCE_SCATTER, "gradients", split(sizes.values(), ranks), sent, accumulation, overlapped=True),
        Collective(ALL_GATHER, "weights", gathered, width, accumulation, overlapped=True),
        Collective(ALL_GATHER, "persistent weights", whole, width, overlapped=True),
    ]
