"""Heads, KV heads, neurons and experts of a layer: which group has them, and where they are in Hugging Face's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sgtm.masking.partition import LayerPartition


@dataclass(frozen=True)
class Units:
    """Heads, KV heads, neurons or experts of one layer: how many each group has, their original order, rows of each."""

    counts: tuple[int, ...]
    order: Sequence[int]
    rows_each: int

    @property
    def row_counts(self) -> tuple[int, ...]:
        return tuple(count * self.rows_each for count in self.counts)

    def remaining(self, factors: Sequence[float]) -> int:
        """How many are left without the groups whose factor is 0."""
        return sum(count for factor, count in zip(factors, self.counts, strict=False) if factor)

    def to_original(self, rows: Tensor, factors: Sequence[float], drop: bool) -> Tensor:
        """A copy of the rows in the original order, multiplied by the factors of their groups; those of groups whose
        factor is 0 are left out (`drop`) or exactly 0.
        """
        units = rows.unflatten(0, (len(self.order), self.rows_each))
        factor_of = [factor for factor, count in zip(factors, self.counts, strict=False) for _ in range(count)]
        indices = sorted(range(len(self.order)), key=self.order.__getitem__)
        if drop:
            indices = [index for index in indices if factor_of[index]]
        original = units[indices]
        for factor in {*factor_of} - {1.0}:
            places = [factor_of[index] == factor for index in indices]
            original[places] = original[places] * factor if factor else 0
        return original.flatten(0, 1)

    def to_groups(self, rows: Tensor) -> Tensor:
        """Rows of the original order, in the order of the groups."""
        return rows.unflatten(0, (len(self.order), self.rows_each))[list(self.order)].flatten(0, 1)


def units_of(layer: LayerPartition, head_dim: int) -> dict[str, Units]:
    q_per_kv = sum(layer.heads) // sum(layer.kv_heads)
    kv_order = [head // q_per_kv for head in layer.head_order[::q_per_kv]]
    return {
        "heads": Units(layer.heads, layer.head_order, head_dim),
        "kv_heads": Units(layer.kv_heads, kv_order, head_dim),
        "neurons": Units(layer.neurons, layer.neuron_order, 1),
        "experts": Units(layer.experts, layer.expert_order, 1),  # of the router
    }


def fuse(parts: list[Tensor], row_counts: list[tuple[int, ...]]) -> Tensor:
    """[q k v of retain | q k v of domain 1 | ...] from q, k and v, whose groups have `row_counts` rows."""
    pieces = [part.split(counts) for part, counts in zip(parts, row_counts, strict=True)]
    return torch.cat([piece for group in zip(*pieces, strict=True) for piece in group])


def unfuse(fused: Tensor, row_counts: list[tuple[int, ...]]) -> list[Tensor]:
    """Inverse of `fuse`."""
    pieces = fused.split([count for group in zip(*row_counts, strict=True) for count in group])
    return [torch.cat(pieces[i :: len(row_counts)]) for i in range(len(row_counts))]
