"""Which heads and neurons of which layers belong to which group.

Groups are contiguous ranges, retain first. With grouped-query attention a group owns whole KV groups: `n` KV heads with
the query heads that share them. In a mixture of experts it owns whole experts: their neurons, and their rows of the
router. Shared experts, which every token runs through, belong to the retain group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple, TypeVar

from sgtm.masking.labels import LabelSpace

T = TypeVar("T")
Sizes = dict[str, int | list[int]]
"""By domain, how many members its group has in a layer, or their original indices."""
ENDS = ("embedding", "head")
"""Matrices of which a domain may have a part of its own."""


@dataclass(frozen=True)
class LayerPartition:
    """One layer: how many query heads, KV heads and neurons each group has, retain first.

    head_order, neuron_order  original index of the query head or neuron at each place; identity unless the groups were
                              given as explicit lists. Imports permute by it and exports permute back.
    experts, expert_order     the same of the experts that the router chooses from; empty where there are none. Their
                              neurons are among `neurons`, after those of the shared experts.
    """

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    neurons: tuple[int, ...]
    head_order: tuple[int, ...]
    neuron_order: tuple[int, ...]
    experts: tuple[int, ...] = ()
    expert_order: tuple[int, ...] = ()

    @property
    def head_bounds(self) -> tuple[int, ...]:
        return _bounds(self.heads)

    @property
    def kv_bounds(self) -> tuple[int, ...]:
        return _bounds(self.kv_heads)

    @property
    def neuron_bounds(self) -> tuple[int, ...]:
        return _bounds(self.neurons)

    @property
    def expert_bounds(self) -> tuple[int, ...]:
        return _bounds(self.experts)


@dataclass(frozen=True)
class Partition:
    """One `LayerPartition` for each layer; a layer outside `masked_layers` has a single group holding everything.

    embedding  each domain's own part of embedding and head: `none`, a whole matrix (`full`), or its rank
    """

    groups: tuple[str, ...]
    layers: tuple[LayerPartition, ...]
    embedding: Literal["none", "full"] | int = "none"

    def masked(self, layer: int) -> bool:
        return len(self.layers[layer].heads) > 1


def _bounds(counts: Sequence[int]) -> tuple[int, ...]:
    return (0, *accumulate(counts))


def build_partition(
    space: LabelSpace,
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    neurons: int,
    forget_heads: int | Sizes,
    forget_neurons: int | Sizes,
    percent: float | dict[str, float] | None = None,
    masked_layers: Sequence[int] | None = None,
    embedding: Literal["none", "full"] | int = "none",
    experts: int = 0,
    shared_experts: int = 0,
    forget_experts: int | Sizes = 0,
) -> Partition:
    """Partition of a model with `heads` query heads, `kv_heads` KV heads and `neurons` MLP neurons in each layer.

    forget_heads, forget_neurons  for every domain alike, or by domain: a count per layer, which may be 0, or original
                   indices
    percent        instead of both: percent of each layer's heads and of its neurons for the domain, rounded to the
                   nearest whole KV group and neuron (at least one of each), so percent of the layer's group-owned
                   parameters
    masked_layers  layers that have groups; None: all
    embedding      as in `Partition`
    experts        of each layer, each of `neurons` neurons, and `shared_experts` beside them: then `forget_experts`, in
                   the form of `forget_neurons`, takes its place, also for `percent`; 0: none

    Raises ValueError naming the key for counts that split a KV group, indices that repeat or do not exist, and a
    partition that leaves no retain head or neuron, or a domain nothing of its own.
    """
    q_per_kv = heads // kv_heads
    mlp = "forget_experts" if experts else "forget_neurons"
    units, of_domains = (experts, forget_experts) if experts else (neurons, forget_neurons)
    wanted_heads, wanted_mlp = _sizes(space, heads, kv_heads, units, forget_heads, of_domains, percent, mlp)
    head_lists = _members(space, wanted_heads, heads, "forget_heads")
    mlp_lists = _members(space, wanted_mlp, units, mlp)
    for domain, of_domain in wanted_heads.items():
        _check_kv_groups(domain, of_domain, q_per_kv)
        if embedding == "none" and not of_domain and not wanted_mlp[domain]:
            raise ValueError(
                f"forget_heads {domain}: 0, with {mlp} 0, leaves the domain no group; set one of them above 0"
            )
    head_order = tuple(h for members in head_lists for h in members)
    head_counts = tuple(len(members) for members in head_lists)
    mlp_order = tuple(unit for members in mlp_lists for unit in members)
    mlp_counts = tuple(len(members) for members in mlp_lists)
    kv_counts = tuple(count // q_per_kv for count in head_counts)

    def layer(head_counts, kv_counts, head_order, mlp_counts, mlp_order) -> LayerPartition:
        if not experts:
            return LayerPartition(head_counts, kv_counts, mlp_counts, head_order, mlp_order)
        of_experts = _neurons_of_experts(mlp_counts, mlp_order, neurons, shared_experts)
        return LayerPartition(head_counts, kv_counts, of_experts[0], head_order, of_experts[1], mlp_counts, mlp_order)

    masked = layer(head_counts, kv_counts, head_order, mlp_counts, mlp_order)
    plain = layer((heads,), (kv_heads,), tuple(range(heads)), (units,), tuple(range(units)))
    chosen = set(range(layers) if masked_layers is None else masked_layers)
    if not chosen <= set(range(layers)):
        raise ValueError(f"masked_layers {sorted(chosen)} name a layer outside 0..{layers - 1}")
    return Partition(space.groups, tuple(masked if i in chosen else plain for i in range(layers)), embedding)


def _neurons_of_experts(
    counts: tuple[int, ...], order: tuple[int, ...], size: int, shared: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Neurons of each group, and their original order, of experts of `size` neurons; shared ones come first."""
    retain, *domains = (count * size for count in counts)
    experts = [*range(shared), *(shared + expert for expert in order)]
    return (shared * size + retain, *domains), tuple(expert * size + n for expert in experts for n in range(size))


class Widths(NamedTuple):
    """What `build_partition` takes for groups that are added: widths of all groups together, and counts by domain."""

    heads: int
    kv_heads: int
    neurons: int
    forget_heads: dict[str, int]
    forget_neurons: dict[str, int]


def added_widths(
    space: LabelSpace,
    *,
    heads: int,
    kv_heads: int,
    neurons: int,
    forget_heads: int | Sizes,
    forget_neurons: int | Sizes,
    percent: float | dict[str, float] | None = None,
    mlp: Literal["forget_neurons", "forget_experts"] = "forget_neurons",
) -> Widths:
    """Widths of a layer whose retain group has `heads`, `kv_heads` and `neurons`, the domains' groups on top (GRAM).

    The sizes are as `build_partition` takes them, `percent` of the retain group's widths. mlp: the key of
    `forget_neurons`, which with `forget_experts` are experts, as `neurons` are. Raises ValueError naming the
    key for indices, which added groups do not have, and for counts that split a KV group.
    """
    q_per_kv = heads // kv_heads
    sizes = _sizes(space, heads, kv_heads, neurons, forget_heads, forget_neurons, percent, mlp)
    counts: list[dict[str, int]] = [{}, {}]
    for key, wanted, of_key in zip(("forget_heads", mlp), sizes, counts, strict=True):
        for domain, size in wanted.items():
            if not isinstance(size, int):
                raise ValueError(f"{key} {domain}: {size} are indices in a model; an added group takes a count")
            of_key[domain] = size
    for domain, count in counts[0].items():
        _check_kv_groups(domain, count, q_per_kv)
    more_heads, more_neurons = (sum(of_key.values()) for of_key in counts)
    return Widths(heads + more_heads, kv_heads + more_heads // q_per_kv, neurons + more_neurons, *counts)


def _sizes(
    space: LabelSpace,
    heads: int,
    kv_heads: int,
    neurons: int,
    forget_heads: int | Sizes,
    forget_neurons: int | Sizes,
    percent: float | dict[str, float] | None,
    mlp: str,
) -> tuple[Sizes, Sizes]:
    """Heads of each domain's group, and neurons or experts, whose key is `mlp`."""
    if percent is not None:
        share = {d: p / 100 for d, p in _by_domain(space, percent, "percent").items()}
        forget_heads = {d: max(1, round(kv_heads * s)) * (heads // kv_heads) for d, s in share.items()}
        forget_neurons = {d: max(1, round(neurons * s)) for d, s in share.items()}
    return _by_domain(space, forget_heads, "forget_heads"), _by_domain(space, forget_neurons, mlp)


def _check_kv_groups(domain: str, heads: int | list[int], q_per_kv: int) -> None:
    """Raises ValueError where a domain would own a part of a KV group."""
    share = f"forget_heads {domain}: {q_per_kv} query heads share a KV head"
    if isinstance(heads, int):
        if heads % q_per_kv:
            raise ValueError(f"{share}; give a multiple of {q_per_kv} in place of {heads}")
        return
    for first in sorted({head - head % q_per_kv for head in heads}):
        if not set(range(first, first + q_per_kv)) <= set(heads):
            raise ValueError(f"{share}; list all of {first}-{first + q_per_kv - 1} or none, got {sorted(heads)}")


def _by_domain(space: LabelSpace, value: T | dict[str, T], key: str) -> dict[str, T]:
    if not isinstance(value, dict):
        return dict.fromkeys(space.domains, value)
    if set(value) != set(space.domains):
        raise ValueError(f"{key} must name every domain ({', '.join(space.domains)}), got {sorted(value)}")
    return value


def _members(space: LabelSpace, wanted: Sizes, total: int, key: str) -> list[list[int]]:
    """Original indices of each group, retain first; counts take from the end, the last domain last."""
    explicit = [i for value in wanted.values() if not isinstance(value, int) for i in value]
    if len(set(explicit)) != len(explicit) or any(not 0 <= i < total for i in explicit):
        raise ValueError(f"{key}: indices must be distinct and within 0..{total - 1}, got {explicit}")
    free = [i for i in range(total) if i not in set(explicit)]
    counted = sum(value for value in wanted.values() if isinstance(value, int))
    if min([v for v in wanted.values() if isinstance(v, int)], default=0) < 0 or counted >= len(free):
        raise ValueError(
            f"{key}: {counted + len(explicit)} of {total} would be forget, which leaves no retain member; "
            f"at least one must remain"
        )
    retain, pool = free[: len(free) - counted], free[len(free) - counted :]
    groups = [retain]
    for domain in space.domains:
        value = wanted[domain]
        if isinstance(value, int):
            groups.append(pool[:value])
            pool = pool[value:]
        else:
            groups.append(sorted(value))
    return groups
