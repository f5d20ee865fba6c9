"""A strategy as small tables of floats, indexed by the label of a token and the group of a head or neuron.

Nothing here imports torch: a config is checked, and a mistake in it printed, before anything heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

PROJECTIONS = ("attn_in", "attn_out", "mlp_in", "mlp_out")
JointKind = Literal["attn_out_bias", "mlp_out_bias", "norm", "final_norm", "embedding", "position", "head", "head_bias"]
JOINT_KINDS: tuple[JointKind, ...] = get_args(JointKind)


@dataclass(frozen=True)
class Tables:
    """A strategy: multipliers by label `l` (first index) and group `g` (second index); group 0 is retain.

    active[l][g]              the group's output in the forward pass (neuron after the non-linearity, head before `Wo`)
    route[l][g]               the gradient that flows back through that output; the forward value is unchanged
    update[projection][l][g]  the token's contribution to the gradient of the group's weights and in-side biases
    update_joint[kind][l]     the same for parameters that belong to no head or neuron
    steered[l][g]             whether the direction of the group's domain, if there is one, is added to the residual
                              stream of the token (sgtm/model/steering.py); empty: never
    """

    labels: tuple[str, ...]
    groups: tuple[str, ...]
    active: tuple[tuple[float, ...], ...]
    route: tuple[tuple[float, ...], ...]
    update: dict[str, tuple[tuple[float, ...], ...]]
    update_joint: dict[str, tuple[float, ...]]
    steered: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self):
        grid = (len(self.labels), len(self.groups))
        steered = [("steered", self.steered)] if self.steered else []
        for name, table in [("active", self.active), ("route", self.route), *self.update.items(), *steered]:
            if (len(table), *{len(row) for row in table}) != grid:
                raise ValueError(f"table {name!r} must be {grid[0]} labels x {grid[1]} groups, got {table}")
        if set(self.update) != set(PROJECTIONS) or set(self.update_joint) != set(JOINT_KINDS):
            raise ValueError(f"update needs exactly {PROJECTIONS}, and update_joint exactly {JOINT_KINDS}")
        if any(len(row) != grid[0] for row in self.update_joint.values()):
            raise ValueError(f"update_joint needs one value for each of the {grid[0]} labels")

    def contribution(self, projection: str, label: int, group: int) -> float:
        """`update` where a gradient arrives at all, else 0: an inactive group gets none, a stopped one none in-side.
        Projections without `update` (a domain's own embedding and head) learn where the group is active."""
        if projection not in self.update:
            return self.active[label][group]
        reaches = self.active[label][group] * (self.route[label][group] if projection.endswith("_in") else 1.0)
        return self.update[projection][label][group] if reaches != 0 else 0.0

    @cached_property
    def contributions(self) -> dict[str, tuple[tuple[float, ...], ...]]:
        """`contribution` of every projection: by group and label."""
        labels, groups = range(len(self.labels)), range(len(self.groups))
        return {
            projection: tuple(
                tuple(self.contribution(projection, label, group) for label in labels) for group in groups
            )
            for projection in PROJECTIONS
        }

    @cached_property
    def columns(self) -> dict[str, tuple[tuple[float, ...], ...]]:
        """`active`, `route` and their product (`passes`): by group and label."""
        active, route = tuple(zip(*self.active, strict=True)), tuple(zip(*self.route, strict=True))
        pairs = zip(active, route, strict=True)
        passes = tuple(tuple(a * r for a, r in zip(*rows, strict=True)) for rows in pairs)
        return {"active": active, "route": route, "passes": passes}
