"""How large what a group adds to the residual stream is, and the stream itself: by layer and by label.

One definition everywhere: the norm of a token is the L2 norm of its vector of the hidden size, and the norm of a label
is the mean over its tokens (those that have a target). A mean of norms, and not the root of a mean of squares, since a
few tokens of a language model have norms hundreds of times those of the others.

A group's output is its heads' (or neurons') columns times its rows of `w_o` (`w_out`), without the joint bias. The
products of the small groups are computed; the largest group's is what is left of the layer's output, so that no product
is as large as the layer's own. In bf16 the rounding of that output, 0.1 % of its norm, then is in the largest group's.

Where a layer has experts, there are also the least and the largest share of a label's choices that fell on one expert
of a group: where the least is 0, an expert is not chosen. Shares of a label add up to 1 over the experts of a layer.

Where a run has a direction (sgtm/model/steering.py), there is also the stream's mean projection on its unit vector, by
label: after its block, before it is added. The stream's norms after that block are those of the sum.

Nothing here changes what the model computes, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal, TypedDict

import torch

from sgtm.data.batch import IGNORE
from sgtm_kernels.experts import choices
from sgtm_kernels.plan import MaskPlan, Tables

Sublayer = Literal["attention", "mlp"]
Source = Literal["residual", "projection"] | Sublayer


class LabelNorms(TypedDict, total=False):
    """Norms of one label: of the stream by layer, and of what the groups add to it by group and layer. With experts
    the least and the largest share of one, by group and layer; with a direction the stream's projection on it."""

    residual: list[float]
    attention: dict[str, list[float]]
    mlp: dict[str, list[float]]
    experts: dict[str, list[tuple[float, float]]]
    projection: float


Norms = dict[str, LabelNorms]


class OutputNorms:
    """Sums over the forward passes that it is handed to (`Transformer.forward`), on the device.

    groups  whether what the groups add is measured, and not the stream alone
    Outside a forward pass calls do nothing: activation checkpointing computes blocks again in the backward pass.
    """

    def __init__(self, tables: Tables, groups: bool = True):
        self.tables, self.groups = tables, groups
        self._keys: list[tuple[Source, int]] = []
        self._by_token: list[torch.Tensor] = []
        self._bounds: list[tuple[int, ...]] = []
        self._choices: list[torch.Tensor] = []
        self._sums: torch.Tensor | None = None
        self._open = False

    def begin(self, plan: MaskPlan, targets: torch.Tensor) -> None:
        """A forward pass begins; targets int64 [B, S]: tokens whose target is `IGNORE` do not count."""
        device = targets.device
        labels = torch.arange(len(self.tables.labels), dtype=torch.int32, device=device)
        counts = plan.labels(device)[:, None] == labels
        self._counted = targets != IGNORE
        self._weights = (counts & self._counted.flatten()[:, None]).double()
        self._keys, self._by_token, self._bounds, self._choices, self._open = [], [], [], [], True
        self._active = {g for label in plan.present for g, on in enumerate(self.tables.active[label]) if on != 0}
        self._zeros = torch.zeros(plan.tokens, device=device)  # what the other groups add

    @torch.no_grad()
    def residual(self, x: torch.Tensor) -> None:
        """The residual stream [B, S, D]: before the first block, and after each."""
        if self._open:
            self._add("residual", 0, x)

    @torch.no_grad()
    def project(self, x: torch.Tensor, unit: torch.Tensor) -> None:
        """The residual stream [B, S, D] before a direction is added; unit: fp32 [D], of norm 1."""
        if self._open:
            self._keys.append(("projection", 0))
            self._by_token.append((x.float() @ unit).flatten())

    @torch.no_grad()
    def outputs(
        self,
        sublayer: Sublayer,
        out: torch.Tensor,
        inner: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        bounds: tuple[int, ...],
    ) -> None:
        """What each group of a layer adds to the stream; called inside the forward pass that owns the weight.

        out     [B, S, D] = inner @ weight + bias
        inner   [B, S, rows], weight [rows, D], bias [D]; bounds: the groups' boundaries in the rows
        """
        if not (self._open and self.groups):
            return
        spans = [slice(*span) for span in pairwise(bounds)]
        largest = max(range(len(spans)), key=lambda group: spans[group].stop - spans[group].start)
        inner, out = inner.flatten(0, 1), out.flatten(0, 1)
        left, right = [], []
        for group, rows in enumerate(spans):
            if group != largest and len(spans) > 1 and group not in self._active:
                self._keys.append((sublayer, group))
                self._by_token.append(self._zeros)
            elif group != largest:
                left.append(inner[:, rows])
                right.append(weight[rows])
                self._add(sublayer, group, left[-1] @ right[-1])
        if bias is not None:
            left.append(inner.new_ones(len(inner), 1))
            right.append(bias[None])
        if left:  # one pass over the output
            out = torch.addmm(out, torch.cat(left, dim=1), torch.cat(right), alpha=-1)
        self._add(sublayer, largest, out)

    @torch.no_grad()
    def parts(self, sublayer: Sublayer, out: torch.Tensor, groups: int, part_of: Callable[[int], torch.Tensor]) -> None:
        """`outputs` of a layer whose output [B, S, D] is the sum of what `part_of` returns for each of its groups."""
        if not (self._open and self.groups):
            return
        for group in range(1, groups):
            if group in self._active:
                part = part_of(group)
                out = out - part
                self._add(sublayer, group, part)
            else:
                self._keys.append((sublayer, group))
                self._by_token.append(self._zeros)
        self._add(sublayer, 0, out)

    def choices(self, chosen: torch.Tensor, plan: MaskPlan, bounds: tuple[int, ...]) -> None:
        """The experts that the tokens of a layer have chosen (`sgtm_kernels.experts.route`); bounds: of the groups."""
        if self._open and self.groups:
            self._bounds.append(bounds)
            self._choices.append(choices(chosen, self._counted, plan, bounds).t())

    def end(self) -> None:
        """The forward pass is over."""
        by_label = torch.stack(self._by_token).double() @ self._weights
        sums = torch.cat((by_label, self._weights.sum(0)[None], *self._choices))
        self._sums = sums if self._sums is None else self._sums + sums
        self._by_token, self._choices, self._open = [], [], False

    def _add(self, source: Source, group: int, x: torch.Tensor) -> None:
        self._keys.append((source, group))
        self._by_token.append(torch.linalg.vector_norm(x, dim=-1).flatten())

    def take(self, all_reduce_sum: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums) -> Norms:
        """Means over the tokens of all ranks, of the labels that occurred; reads the device. A collective call.

        `residual` has an entry for the embedding and one for each layer. A group that is inactive for a label is left
        out; a layer without groups has everything under retain. Groups are missing where blocks are compiled.
        """
        if self._sums is None:
            return {}
        rows = all_reduce_sum(self._sums).cpu().tolist()
        counts, by_expert = rows[len(self._keys)], rows[len(self._keys) + 1 :]
        norms: Norms = {}
        for label, name in enumerate(self.tables.labels):
            if not counts[label]:
                continue
            mine: LabelNorms = {"residual": []}
            norms[name] = mine
            for (source, group), row in zip(self._keys, rows[: len(self._keys)], strict=True):
                mean = _rounded(row[label] / counts[label])
                if source == "residual":
                    mine[source].append(mean)
                elif source == "projection":
                    mine[source] = mean
                elif self.tables.active[label][group] != 0:
                    mine.setdefault(source, {}).setdefault(self.tables.groups[group], []).append(mean)
            if self._bounds:
                mine["experts"] = self._shares(label, [row[label] for row in by_expert])
        return norms

    def _shares(self, label: int, chosen: list[float]) -> dict[str, list[tuple[float, float]]]:
        """The least and the largest share of an expert, by group and layer; `chosen`: how often each layer's was."""
        shares: dict[str, list[tuple[float, float]]] = {}
        first = 0
        for bounds in self._bounds:
            of_layer = chosen[first : first + bounds[-1]]
            first, total = first + bounds[-1], sum(of_layer) or 1.0
            for group, (start, end) in enumerate(pairwise(bounds)):
                if end > start and (len(bounds) == 2 or self.tables.active[label][group] != 0):
                    of_group = [_rounded(times / total) for times in of_layer[start:end]]
                    shares.setdefault(self.tables.groups[group], []).append((min(of_group), max(of_group)))
        return shares


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
