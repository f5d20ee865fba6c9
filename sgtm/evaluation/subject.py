"""A model without some of its domains, as the measures see it: hidden states and logits, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sgtm.config.schema import Config
from sgtm.data.batch import IGNORE, Batch
from sgtm.data.loader import evaluation_batches
from sgtm.data.store import Corpus
from sgtm.model.transformer import Transformer
from sgtm_kernels.plan import LabelRun, MaskPlan, Tables

LOGITS = 2**22  # at a time: 16 MiB in fp32, which stay in the allocator


class Hidden(NamedTuple):
    """Hidden states of some tokens, and the head that reads them.

    x       [tokens, D]
    weight  [V, D]; bias: [V] or None
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def logits(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """fp32 logits [n, V] of stretches of the tokens, in order."""
        step = max(1, LOGITS // len(self.weight))
        for start in range(0, len(self.x), step):
            part = slice(start, start + step)
            yield part, F.linear(self.x[part], self.weight, self.bias).float()


class Scores(NamedTuple):
    """What a subject assigns to targets.

    losses    float32 [targets]: nats
    hits      bool [targets]: the target is the most likely token
    document  int64 [targets]: whose they are; any numbers that differ between documents
    """

    losses: torch.Tensor
    hits: torch.Tensor
    document: torch.Tensor


@dataclass(frozen=True)
class Subject:
    """`model` without the groups of `removed`, on the data of `corpus` as `config` packs them.

    bases  by domain, the model without its adapters: where there are some, these domains can be removed and no group
    """

    model: Transformer
    corpus: Corpus
    config: Config
    removed: tuple[str, ...] = ()
    bases: Mapping[str, Transformer] = field(default_factory=dict)

    @property
    def removals(self) -> list[tuple[str, ...]]:
        """The sets of domains without which there is a model, the empty one first."""
        return [(), *((domain,) for domain in self.bases)] if self.bases else self.config.removals

    def without(self, *domains: str) -> Subject:
        """The model without these domains, a set of `removals`."""
        if domains and self.bases:
            (domain,) = domains
            return replace(self, model=self.bases[domain], bases={})
        return replace(self, removed=domains)

    @cached_property
    def tables(self) -> Tables:
        return self.config.removal_tables(self.removed)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def hidden(self, input_ids: torch.Tensor, plan: MaskPlan) -> Hidden:
        """Of int64 [B, S] on the subject's device."""
        x, weight, bias = self.model.last_hidden(input_ids, plan)
        return Hidden(x.flatten(0, 1), weight, bias)

    def plan(self, input_ids: torch.Tensor) -> MaskPlan:
        """Masks for sequences that are not of the corpus: each attends to all of its own past."""
        batch, seq_len = input_ids.shape
        return MaskPlan(self.tables, (LabelRun(0, 0, batch * seq_len),), batch, seq_len)

    def batches(self, split: str, category: str, sequences: int | None) -> Iterator[Batch]:
        """Raises ValueError for a split or category that the corpus does not have, or without a target."""
        empty = True
        for batch in evaluation_batches(self.corpus, self.config, split, category, max_sequences=sequences):
            empty = False
            yield batch
        if empty:
            raise ValueError(f"split {split} of {self.corpus.path} has no document of category {category}")

    @torch.no_grad()
    def scores(self, split: str, category: str, sequences: int | None = None) -> Scores:
        """Score all targets of up to `sequences` sequences of a category, in the order of the evaluation."""
        parts = []
        for batch in self.batches(split, category, sequences):
            ids, targets, plan = batch.on(self.device, self.tables)
            assert batch.owners is not None  # it is of an evaluation
            parts.append(scored(self.hidden(ids, plan), targets, batch.owners.index.to(self.device)))
        return Scores(*(torch.cat(part) for part in zip(*parts, strict=True)))


def scored(hidden: Hidden, targets: torch.Tensor, documents: torch.Tensor) -> Scores:
    """Of the targets that are not `IGNORE`; targets, documents: int64, one for each hidden state, of any shape."""
    targets, documents = targets.flatten(), documents.flatten()
    chosen = targets != IGNORE
    hidden, targets, documents = hidden._replace(x=hidden.x[chosen]), targets[chosen], documents[chosen]
    losses, hits = [], []
    for part, logits in hidden.logits():
        losses.append(F.cross_entropy(logits, targets[part], reduction="none"))
        hits.append(logits.argmax(-1) == targets[part])
    if not losses:
        return Scores(torch.empty(0), torch.empty(0, dtype=torch.bool), documents.cpu())
    return Scores(torch.cat(losses).cpu(), torch.cat(hits).cpu(), documents.cpu())
