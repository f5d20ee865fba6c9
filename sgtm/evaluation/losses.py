"""Loss of every category, for the full model and for sets of removed domains, and the norms of what layers add.
Of a model that was trained without masks nothing is removed (`Config.removals`), unless a domain is in adapters: then
the model without it is another one, its base.

An ablated loss is a forward pass with those groups inactive: no weight is edited, so it works on a sharded model in
training as on a loaded one. Losses are nats per target token, a mean over all tokens of the category; in a document
with labelled spans each token is of its own category, and is read after those of others.

Beside every loss stands its standard error: how far it would be off with other documents of the same kind.

Tokens of one document resemble one another, so the documents are what is drawn, and not the tokens. A mean loss over
tokens is a ratio of two sums over documents, and its error that of the ratio estimator (Cochran, Sampling Techniques,
1977, section 6.4): with s_d the sum of a document's losses, n_d its targets and m the mean loss,

    error^2 = D / (D - 1) * sum_d (s_d - m n_d)^2 / (sum_d n_d)^2        D documents

The error of a difference between two conditions on the same documents is that of the documents' differences, which is
far smaller than the errors of the two losses. Other seeds of the training are not in any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sgtm.config.schema import Config
from sgtm.data.batch import IGNORE, Owners
from sgtm.data.loader import evaluation_batches
from sgtm.data.store import Corpus
from sgtm.masking.labels import FULL, removal_name, strength_name
from sgtm.model.output_norms import Norms, OutputNorms
from sgtm_kernels.cross_entropy import kept_losses

Losses = dict[str, dict[str, float]]


class Evaluation(NamedTuple):
    """What an evaluation finds.

    losses  by condition (`removal_name`, `strength_name`) and category, nats per target token
    norms   by the same, those of sgtm/model/output_norms.py; what the groups add is in those of the full model alone,
            as a number for each group, category and condition would grow with the cube of the domains
    sample  what the losses rest on, as JSON: `true_labels` of the categories; `measured`, by category, numbers of
            `documents` and `tokens` (targets); `errors`, standard errors of the losses, by removed set and category;
            `difference_errors`, those of the difference to the full model. A single document has no error
    """

    losses: Losses
    norms: dict[str, Norms]
    sample: dict[str, Any]


@torch.no_grad()
def evaluate(
    forward: Callable,
    corpus: Corpus,
    config: Config,
    *,
    split: str,
    sequences: int | None,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    all_reduce_sum: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
    check: Callable[[], None] = lambda: None,
    bases: Mapping[str, Callable] | None = None,
    strengths: Sequence[Mapping[str, float]] = (),
) -> Evaluation:
    """Losses of every category for every removed set of the config, and what they rest on.

    A batch has one forward pass for each condition: the time grows in proportion to the number of conditions, and to
    the number of sequences.

    forward    `Transformer.forward` or an engine around it
    split      of the corpus; sequences: at most this many of each category, None: all
    check      is called before every batch, on all ranks, and may raise to end the evaluation
    bases      by domain, the forward pass of the model without its adapters, all groups active: where there are some,
               these domains are removed, one at a time, and no group is
    strengths  models besides, each with some domains at a strength from 0 to 1 (`removal_tables`)
    Every rank takes its share of the sequences, with the same number of forward passes.

    Raises ValueError where the split has no target at all.
    """
    removals = [(), *((domain,) for domain in bases)] if bases else config.removals
    tables = [config.removal_tables(() if bases else removed) for removed in removals]
    titrated = {strength_name(by_domain): by_domain for by_domain in strengths}
    tables += [config.removal_tables((), by_domain) for by_domain in titrated.values()]
    passes = [forward, *bases.values()] if bases else [forward] * len(tables)
    losses: Losses = {removal_name(removed): {} for removed in removals}
    losses |= {name: {} for name in titrated}
    norms: dict[str, Norms] = {name: {} for name in losses}
    sample: dict[str, Any] = {
        "true_labels": dict(corpus.categories),
        "measured": {},
        "errors": {name: {} for name in losses},
        "difference_errors": {name: {} for name in losses if name != FULL},
    }
    for category in corpus.categories:
        sums = torch.zeros(len(losses) + 1, dtype=torch.float64, device=device)
        by_document: DocumentLosses | None = None
        by_table = [OutputNorms(table, groups=name == FULL) for name, table in zip(losses, tables, strict=True)]
        for batch in evaluation_batches(
            corpus, config, split, category, max_sequences=sequences, rank=rank, world_size=world_size
        ):
            check()
            ids, targets = batch.input_ids.to(device), batch.targets.to(device)
            sums[-1] += (targets != IGNORE).sum()
            assert batch.owners is not None  # it is of an evaluation
            by_document = by_document or DocumentLosses(len(losses), batch.owners.count, device)
            by_document.count(batch.targets, batch.owners)
            for i, (table, condition) in enumerate(zip(tables, passes, strict=True)):
                plan = batch.plan(table)
                token_losses = kept_losses(plan, keep=True)
                sums[i] += condition(ids, targets, plan, 1.0, by_table[i])[1].sum()
                assert token_losses is not None  # they are to be kept
                by_document.add(i, token_losses[0])  # of one label, so the head is called once
        *totals, count = all_reduce_sum(sums).tolist()
        if count:
            assert by_document is not None  # there was a batch
            for name, total, of_category in zip(losses, totals, by_table, strict=True):
                losses[name][category] = total / count
                norms[name][category] = of_category.take(all_reduce_sum)[corpus.categories[category]]
            _add_errors(sample, category, all_reduce_sum(by_document.sums).cpu())
    if not any(losses.values()):
        raise ValueError(f"split {split} of {corpus.path} has no token that follows another: there is no loss")
    return Evaluation(losses, norms, sample)


def _add_errors(sample: dict[str, Any], category: str, by_document: torch.Tensor) -> None:
    """by_document  float64 [conditions + 1, documents]: sums of losses, and last the numbers of targets"""
    *sums, counts = by_document
    sample["measured"][category] = {"documents": int((counts > 0).sum()), "tokens": int(counts.sum())}
    of_full = sums[list(sample["errors"]).index(FULL)]
    for name, mine in zip(sample["errors"], sums, strict=True):
        pairs = [("errors", mine)] + [("difference_errors", mine - of_full)] * (name != FULL)
        for key, values in pairs:
            if (error := standard_error(values, counts)) is not None:
                sample[key][name][category] = error


def not_finite(losses: Losses) -> str:
    """Which losses are NaN or infinite: `en, es (full); es (without es)`; empty where none is."""
    bad = {name: [c for c, loss in by.items() if not math.isfinite(loss)] for name, by in losses.items()}
    return "; ".join(f"{', '.join(categories)} ({name})" for name, categories in bad.items() if categories)


class DocumentLosses:
    """Sums of one category over the documents: token losses by condition, and numbers of targets.

    Sums over the micro-batches that it is handed, on the device; nothing waits for it.
    """

    def __init__(self, conditions: int, documents: int, device: torch.device):
        self.sums = torch.zeros(conditions + 1, documents, dtype=torch.float64, device=device)

    def count(self, targets: torch.Tensor, owners: Owners) -> None:
        """The targets of a micro-batch, int64 [B, S], and whose they are."""
        self.index = owners.index.flatten().to(self.sums.device)
        self.sums[-1].index_add_(0, self.index, (targets.flatten() != IGNORE).double().to(self.sums.device))

    def add(self, condition: int, losses: torch.Tensor) -> None:
        """Token losses [tokens] of the micro-batch that was counted last, 0 where there is no target."""
        self.sums[condition].index_add_(0, self.index, losses.double())


def standard_error(sums: torch.Tensor, counts: torch.Tensor) -> float | None:
    """Of sums.sum() / counts.sum(), by document; None for less than two documents, or if it is not finite.

    sums    float64 [documents]: losses, or differences of losses
    counts  float64 [documents]: number of targets
    """
    sums, counts = sums[counts > 0], counts[counts > 0]
    documents = len(counts)
    if documents < 2:
        return None
    missed = sums - counts * (sums.sum() / counts.sum())
    error = math.sqrt(documents / (documents - 1) * float(missed.square().sum())) / float(counts.sum())
    return float(f"{error:.5g}") if math.isfinite(error) else None
