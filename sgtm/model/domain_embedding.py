"""A domain's own part of the token embedding and of the head: added to the shared matrices where its group is active.

With `masking.joint: strict` forget tokens train no shared matrix, so the words of a domain could not be learned. A part
of embedding and head that belongs to the domain's group learns them, is frozen when the group is, and goes when the
group goes. A token whose label l has active[l][g] != 0 is looked up in E + sum over g of active[l][g] * E_g, and its
logits come from the head with the same sum; a tied matrix has one part for both ends. E_g is a whole matrix that starts
at 0 (`full`), or rows [V, r] times a basis [r, D] that starts at 0 (rank r).

Tokens are taken in *subsets* with the same sum. Each subset has one product with a summed head, so the head's product
never runs twice for a token, and a token whose label has no active domain is computed without a domain's weights.

Promises (tests/unit/test_domain_embedding.py): losses and gradients are those of the formula; a domain's part gets a
gradient of exactly 0 from tokens on which its group is inactive, and a full gradient of zeros where there is no other
token; and the gradients of all parameters are complete in one order, whatever the labels are. ZeRO 2 and 3 reduce
them in that order, and ranks with other labels would add up the gradients of different parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from sgtm.model.domain_parts import ends
from sgtm_kernels.plan import MaskPlan, Tables, merge_label_runs, table_on


@dataclass(frozen=True)
class Subset:
    """Tokens of a micro-batch whose matrices are the same sum.

    active  (group, factor) of each domain in the sum
    learns  weight of these tokens in the gradient of the shared head if a domain is in the sum; otherwise that of
            the plan
    plan    of these tokens alone, as one sequence where they are not all
    index   int64 [tokens], or None: all
    """

    active: tuple[tuple[int, float], ...]
    learns: float
    plan: MaskPlan
    index: torch.Tensor | None


def add_domains(x: torch.Tensor, parts: dict[str, torch.Tensor], ids: torch.Tensor, plan: MaskPlan) -> torch.Tensor:
    """x [B, S, D], embeddings of tokens int64 [B, S] from the shared matrix, plus those of the active domains.

    parts  the parameters of the domains' parts, by name
    """
    for subset in subsets(plan, x.device):
        for group, factor in subset.active:
            tokens = ids.flatten() if subset.index is None else ids.flatten()[subset.index]
            added = _looked_up(parts, group, tokens) * factor
            if subset.index is None:
                x = x + added.view_as(x)
            else:
                x = x.flatten(0, 1).index_add(0, subset.index, added.to(x.dtype)).view_as(x)
    return x


def head_of(shared: torch.Tensor, parts: dict[str, torch.Tensor], tied: bool, subset: Subset) -> torch.Tensor:
    """[V, D]: the head of a subset's tokens; the shared matrix itself where no domain is active."""
    if not subset.active:
        return shared
    weight = _Learns.apply(shared, subset.learns) if subset.learns != 1 else shared
    for group, factor in subset.active:
        name = f"{ends(tied)[-1]}_{group}"
        if name in parts:
            weight = torch.add(weight, parts[name], alpha=factor)
        else:
            weight = torch.addmm(weight, parts[f"{name}_rows"], parts[f"{name}_basis"], alpha=factor)
    return weight


def subsets(plan: MaskPlan, device: torch.device) -> Sequence[Subset]:
    """The tokens of a micro-batch by the sum that they read; cached in the plan."""
    return plan.cached(("subsets", device), lambda: list(_subsets(plan, device)))


def _subsets(plan: MaskPlan, device: torch.device) -> Iterator[Subset]:
    by_sum: dict[tuple, set[int]] = {}
    for label in plan.present:
        active = tuple((g, factor) for g, factor in enumerate(plan.tables.active[label]) if g and factor != 0)
        learns = plan.tables.update_joint["head"][label] if active else 1.0
        by_sum.setdefault((active, learns), set()).add(label)
    if len(by_sum) > 1:
        index = _indices(plan, list(by_sum.values()), device)
    for i, ((active, learns), labels) in enumerate(by_sum.items()):
        tables = _with_all_heads(plan.tables) if active else plan.tables
        if len(by_sum) == 1:
            own = plan if tables is plan.tables else replace(plan, tables=tables)
            yield Subset(active, learns, own, None)
            continue
        runs = [run for run in plan.label_runs if run.label in labels]
        lengths = [run.end - run.start for run in runs]
        own = MaskPlan(tables, merge_label_runs([run.label for run in runs], lengths), 1, sum(lengths))
        own.arrived(plan.labels(device)[index[i]][None])
        yield Subset(active, learns, own, index[i])


def _with_all_heads(tables: Tables) -> Tables:
    """A sum is a matrix of its own, all of whose gradient is wanted: `head_of` decides who learns from it."""
    return replace(tables, update_joint={**tables.update_joint, "head": (1.0,) * len(tables.labels)})


def _indices(plan: MaskPlan, subsets: Sequence[set[int]], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Ascending int64 index of the tokens with the labels of each subset. Sorted on the device, where the plan's labels
    are already: nothing is copied there."""
    number = {label: float(i) for i, labels in enumerate(subsets) for label in labels}
    table = table_on(
        device, torch.float32, (tuple(number.get(label, -1.0) for label in range(len(plan.tables.labels))),)
    )
    sizes = [sum(run.end - run.start for run in plan.label_runs if run.label in labels) for labels in subsets]
    return table[0].index_select(0, plan.labels(device)).argsort(stable=True).split(sizes)


def _looked_up(parts: dict[str, torch.Tensor], group: int, ids: torch.Tensor) -> torch.Tensor:
    name = f"embedding_{group}"
    if name in parts:
        return functional.embedding(ids, parts[name])
    return functional.embedding(ids, parts[f"{name}_rows"]) @ parts[f"{name}_basis"]


class _Learns(torch.autograd.Function):
    """The matrix, its gradient multiplied by a share; by 0 even where it is not finite."""

    @staticmethod
    def forward(ctx, weight, share):
        ctx.share = share
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        return (gradient * ctx.share if ctx.share else torch.zeros_like(gradient)), None
