"""Strategies: which label may update, pass through and activate which group.

A strategy is a set of small tables (see `sgtm_kernels.plan.Tables`); the presets below are the methods of the
literature written in them. Sources: Selective GradienT Masking, arXiv 2512.05648 (`sgtm` and its variants, the
parameter-masking and activation-masking baselines); gradient routing, arXiv 2410.04332; GRAM, "Modular Pretraining
Enables Access Control", ICML 2026.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from sgtm.masking.labels import RETAIN, LabelSpace
from sgtm_kernels.tables import JOINT_KINDS, PROJECTIONS, JointKind, Tables

Strategy = Literal[
    "none", "sgtm", "no_mlp_out", "no_attn_out", "no_out", "gradient_routing", "activation_masking", "gram"
]
Joint = Literal["free", "masked", "strict"]
Grid = list[list[float]]


class _Draft:
    """Tables under construction: everything starts at 1, but for `steered`."""

    def __init__(self, space: LabelSpace):
        self.space = space
        self.active, self.route = self._ones(), self._ones()
        self.update = {projection: self._ones() for projection in PROJECTIONS}
        self.update_joint: dict[str, list[float]] = {kind: [1.0] * len(space.labels) for kind in JOINT_KINDS}
        self.steered = [[0.0] * len(space.groups) for _ in space.labels]

    def _ones(self) -> Grid:
        return [[1.0] * len(self.space.groups) for _ in self.space.labels]

    @property
    def forget(self) -> Iterable[tuple[int, int]]:
        """(label, group) of every domain."""
        return ((label, 1 + k) for k, label in enumerate(self.space.forget_labels))

    def other_domains_inactive(self, owns: Iterable[tuple[int, int]]) -> None:
        """For each (label, group): of the domains' groups this one alone runs."""
        for label, own in owns:
            for _, group in self.forget:
                if group != own:
                    self.active[label][group] = 0.0

    def freeze(self) -> Tables:
        return Tables(
            self.space.labels,
            self.space.groups,
            _frozen(self.active),
            _frozen(self.route),
            {projection: _frozen(grid) for projection, grid in self.update.items()},
            {kind: tuple(row) for kind, row in self.update_joint.items()},
            _frozen(self.steered),
        )


def _frozen(grid: Grid) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in grid)


def _sgtm(draft: _Draft, exempt: tuple[str, ...] = ()) -> None:
    """Forget tokens leave retain weights and output biases alone, but for `exempt` projections and their bias."""
    for label, _ in draft.forget:
        for projection in PROJECTIONS:
            if projection not in exempt:
                draft.update[projection][label][0] = 0.0
                if projection.endswith("_out"):
                    draft.update_joint[f"{projection}_bias"][label] = 0.0


def _gradient_routing(draft: _Draft) -> None:
    for label, _ in draft.forget:
        draft.route[label][0] = 0.0


def _activation_masking(draft: _Draft) -> None:
    for label, _ in draft.forget:
        draft.active[label][0] = 0.0


def _gram(draft: _Draft) -> None:
    draft.other_domains_inactive(draft.forget)
    for label, _ in draft.forget:
        for projection in PROJECTIONS:
            draft.update[projection][label][0] = 0.0


STRATEGY_TABLES: dict[Strategy, Callable[[_Draft], None]] = {
    "none": lambda draft: None,
    "sgtm": _sgtm,
    "no_mlp_out": lambda draft: _sgtm(draft, ("mlp_out",)),
    "no_attn_out": lambda draft: _sgtm(draft, ("attn_out",)),
    "no_out": lambda draft: _sgtm(draft, ("mlp_out", "attn_out")),
    "gradient_routing": _gradient_routing,
    "activation_masking": _activation_masking,
    "gram": _gram,
}

JOINT_PRESETS: dict[Joint, tuple[JointKind, ...]] = {
    "free": (),
    "masked": ("embedding", "position", "head", "norm"),
    "strict": JOINT_KINDS,
}
"""Joint kinds that forget tokens leave alone besides those of the strategy itself (the output biases of `sgtm`)."""


def own_joint(strategy: Strategy) -> Joint:
    """What `joint` is where it is not set: GRAM's code trains no joint parameter on domain data."""
    return "strict" if strategy == "gram" else "free"


def joint_kinds(strategy: Strategy, joint: Joint | Sequence[JointKind] | None) -> tuple[JointKind, ...]:
    """Kinds that `joint` adds to a strategy; None: `own_joint`.

    Raises ValueError for unknown kinds, and where the strategy is `none`, which masks nothing.
    """
    joint = own_joint(strategy) if joint is None else joint
    unknown: list[str]
    if isinstance(joint, str):
        kinds, unknown = JOINT_PRESETS.get(joint, ()), [] if joint in JOINT_PRESETS else [joint]
    else:
        kinds, unknown = tuple(joint), [kind for kind in joint if kind not in JOINT_KINDS]
    if unknown:
        raise ValueError(
            f"joint: {', '.join(map(str, unknown))} is neither {', '.join(JOINT_PRESETS)} nor a list of "
            f"{', '.join(JOINT_KINDS)}"
        )
    if strategy == "none" and kinds:
        raise ValueError("joint: strategy none masks nothing; leave joint out")
    return kinds


def build_tables(
    space: LabelSpace,
    strategy: Strategy,
    joint: Joint | Sequence[JointKind] | None = None,
    cross_domain: str = "inactive",
    overrides: dict[str, float] | None = None,
) -> Tables:
    """Tables of a preset.

    joint         which joint parameters forget tokens leave alone: `free`, `masked`, `strict` or a list of kinds
                  (`joint_kinds`)
    cross_domain  whether tokens of one domain run with the other domains' groups `inactive` or `active`
    overrides     single entries, for titration and weighted contributions: `active.<label>.<group>`,
                  `route.<label>.<group>`, `update.<label>.<group>.<projection>`, `update_joint.<label>.<kind>`

    Raises ValueError for an unknown strategy, a `joint` that the strategy does not have, or an override that names
    nothing.
    """
    if strategy not in STRATEGY_TABLES:
        raise ValueError(f"unknown strategy {strategy!r}; known strategies: {', '.join(STRATEGY_TABLES)}")
    kinds = joint_kinds(strategy, joint)
    draft = _Draft(space)
    for label, group in draft.forget:
        draft.steered[label][group] = 1.0
    if strategy != "none":
        for _, group in draft.forget:
            draft.active[RETAIN][group] = 0.0
        draft.other_domains_inactive(space.open_groups.items())
        if cross_domain == "inactive":
            draft.other_domains_inactive(draft.forget)
        STRATEGY_TABLES[strategy](draft)
        for label in space.forget_labels:
            for kind in kinds:
                draft.update_joint[kind][label] = 0.0
    for key, value in (overrides or {}).items():
        _override(draft, key, value)
    return draft.freeze()


def _override(draft: _Draft, key: str, value: float) -> None:
    space = draft.space
    table, *index = key.split(".")
    try:
        label = space.labels.index(index[0])
        if table in ("active", "route") and len(index) == 2:
            getattr(draft, table)[label][space.groups.index(index[1])] = value
        elif table == "update" and len(index) == 3:
            draft.update[index[2]][label][space.groups.index(index[1])] = value
        elif table == "update_joint" and len(index) == 2 and index[1] in JOINT_KINDS:
            draft.update_joint[index[1]][label] = value
        else:
            raise ValueError(key)
    except (ValueError, KeyError, IndexError):
        raise ValueError(
            f"override {key!r} names no table entry; write active.LABEL.GROUP, route.LABEL.GROUP, "
            f"update.LABEL.GROUP.PROJECTION or update_joint.LABEL.KIND with labels {', '.join(space.labels)}; groups "
            f"{', '.join(space.groups)}; projections {', '.join(PROJECTIONS)}; kinds {', '.join(JOINT_KINDS)}"
        ) from None


def removal_tables(
    space: LabelSpace, removed: Iterable[str], groups: bool = True, strengths: Mapping[str, float] | None = None
) -> Tables:
    """Tables of evaluation: every label runs with the removed domains' groups inactive and nothing else masked.

    strengths  by domain, from 0 to 1: what the outputs of the heads and neurons of its group, and its own part of
               embedding and head, are multiplied by; domains that are left out are at 1, removed ones at 0. It is as
               if the group's rows of Wo and W2 were multiplied: weights of an export are linear in the strength
               (sgtm/evaluation/pair.py)

    The direction of a domain, if there is one (sgtm/model/steering.py), is added to all tokens unless the domain is
    removed. groups: False leaves the groups active, as removing a domain then means to leave its direction out.

    Raises ValueError for an unknown domain, and a strength that is not from 0 to 1.
    """
    draft, without = _Draft(space), {space.group_of(domain) for domain in removed}
    factors = {space.group_of(domain): strength for domain, strength in (strengths or {}).items()}
    for group, strength in factors.items():
        if not 0 <= strength <= 1:
            raise ValueError(f"strength {strength:g} of {space.groups[group]}: a domain is at a strength from 0 to 1")
    without |= {group for group, strength in factors.items() if strength == 0}
    for active, steered in zip(draft.active, draft.steered, strict=True):
        for group in range(1, len(space.groups)):
            if group not in without:
                active[group], steered[group] = factors.get(group, 1.0), 1.0
            elif groups:
                active[group] = 0.0
    return draft.freeze()
