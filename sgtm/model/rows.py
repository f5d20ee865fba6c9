"""Which rows of which parameter belong to whom: the only module that depends on the row layout.

Weights are stored so that every group is one contiguous range of rows: in-side weights (`w_qkv`, `w_in`) as [out, in]
with rows `[q k v of retain | q k v of domain 1 | ...]` (gate/up in the same order), out-side weights (`w_o`, `w_out`)
input-major as [in, out]. Experts of a mixture lie one after the other inside their group, each with gate and up; their
rows of the `router` are [experts, in]. A gradient mask, an optimizer freeze, a ZeRO segment, an ablation and a pruning
are then the same thing: a row range.

Every row range has a *key*: `attn_in.retain`, `mlp_out.es`, ... for rows owned by a group; `norm`, `embedding+head`,
... for joint parameters (a tied matrix has both kinds); `embedding.es`, `head.es` for a domain's own part of these;
`always` for everything in a layer without groups. All rows with one key are updated, or frozen, together.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sgtm.masking.partition import ENDS, LayerPartition
from sgtm_kernels.tables import Tables

ALWAYS = "always"
IN_SIDE, OUT_SIDE = ("w_qkv", "w_in"), ("w_o", "w_out")
"""Matrices of a block, stored as [out, in] and as [in, out]."""


@dataclass(frozen=True)
class Rows:
    """Row ranges of one parameter: rows `bounds[i]:bounds[i + 1]` have key `keys[i]`.

    decay  whether the optimizer decays it (matrices and embeddings; not norms and biases)
    """

    keys: tuple[str, ...]
    bounds: tuple[int, ...]
    decay: bool

    def segments(self, row_size: int) -> Iterable[tuple[int, int, str]]:
        """(start, end, key) over the flattened parameter whose rows have `row_size` elements."""
        for key, start, end in zip(self.keys, self.bounds[:-1], self.bounds[1:], strict=True):
            yield start * row_size, end * row_size, key


def qkv_bounds(layer: LayerPartition, head_dim: int) -> tuple[int, ...]:
    """Rows of the groups in `w_qkv`: query heads, then KV heads twice, for each group."""
    return tuple((q + 2 * kv) * head_dim for q, kv in zip(layer.head_bounds, layer.kv_bounds, strict=True))


def head_row_bounds(layer: LayerPartition, head_dim: int) -> tuple[int, ...]:
    """Rows of the groups in `w_o`."""
    return tuple(head * head_dim for head in layer.head_bounds)


def mlp_in_bounds(layer: LayerPartition, gated: bool) -> tuple[int, ...]:
    """Rows of the groups in `w_in` (and `b_in`): neurons, twice where gate and up are fused."""
    return tuple(neuron * (2 if gated else 1) for neuron in layer.neuron_bounds)


def group_rows(projection: str, groups: tuple[str, ...], bounds: tuple[int, ...], decay: bool = True) -> Rows:
    """Rows owned by the groups of a layer, or by no group where the layer has a single group."""
    if len(bounds) == 2:
        return Rows((ALWAYS,), bounds, decay)
    return Rows(tuple(f"{projection}.{group}" for group in groups), bounds, decay)


def joint_rows(kind: str, rows: int, masked: bool = True, decay: bool = False) -> Rows:
    """A joint parameter of `kind` (`a+b`: of both kinds); in a layer without groups every token updates it."""
    return Rows((kind if masked else ALWAYS,), (0, rows), decay)


def owner_of(key: str, groups: tuple[str, ...]) -> int:
    """Who a key's rows belong to: 0 for the retain group and all joint parameters, else the number of the group."""
    return groups.index(group) if (group := key.partition(".")[2]) else 0


def live_keys(tables: Tables, labels: Iterable[int]) -> frozenset[str]:
    """Keys that a global step with tokens of these labels may update; every other key is frozen in that step."""
    labels = tuple(labels)
    live = {ALWAYS} if labels else set()
    for projection in (*tables.update, *ENDS):
        for g, group in enumerate(tables.groups):
            learned = any(tables.contribution(projection, label, g) != 0 for label in labels)
            if learned and (g or projection in tables.update):
                live.add(f"{projection}.{group}")
    kinds = {kind for kind, by_label in tables.update_joint.items() if any(by_label[label] != 0 for label in labels)}
    live |= kinds
    if kinds & {"embedding", "head"}:
        live.add("embedding+head")
    return frozenset(live)
