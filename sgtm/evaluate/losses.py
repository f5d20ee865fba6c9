"""Loss of every category, for the full model and for every set of removed domains, and the norms of what layers add.

An ablated loss is a forward pass with those groups inactive: no weight is edited, so it works on a sharded model in
training as on a loaded one. Losses are nats per target token, a mean over all tokens of the category's sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from sgtm.config.schema import Config
from sgtm.data.batch import IGNORE
from sgtm.data.loader import evaluation_batches
from sgtm.data.store import Corpus
from sgtm.masking.labels import removal_name
from sgtm.masking.strategy import removal_tables
from sgtm.model.output_norms import Norms, OutputNorms

Losses = dict[str, dict[str, float]]


@torch.no_grad()
def category_losses_and_norms(
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
) -> tuple[Losses, dict[str, Norms]]:
    """Losses by removed set (`removal_name`) and category, and by the same the norms of sgtm/model/output_norms.py.

    forward    `Transformer.forward` or an engine around it
    split      of the corpus; sequences: at most this many of each category, None: all
    check      is called before every batch, on all ranks, and may raise to end the evaluation
    Every rank takes its share of the sequences, with the same number of forward passes.
    """
    subsets = config.space.subsets()
    tables = [removal_tables(config.space, removed) for removed in subsets]
    losses: Losses = {removal_name(removed): {} for removed in subsets}
    norms: dict[str, Norms] = {name: {} for name in losses}
    for category in corpus.categories:
        sums = torch.zeros(len(losses) + 1, dtype=torch.float64, device=device)
        found = [OutputNorms(table) for table in tables]
        for batch in evaluation_batches(
            corpus, config, split, category, max_sequences=sequences, rank=rank, world_size=world_size
        ):
            check()
            ids, targets = batch.input_ids.to(device), batch.targets.to(device)
            sums[-1] += (targets != IGNORE).sum()
            for i, table in enumerate(tables):
                sums[i] += forward(ids, targets, batch.plan(table), 1.0, found[i])[1].sum()
        *totals, count = all_reduce_sum(sums).tolist()
        if count:
            for name, total, of_category in zip(losses, totals, found, strict=True):
                losses[name][category] = total / count
                norms[name][category] = of_category.take(all_reduce_sum)[corpus.categories[category]]
    return losses, norms


def not_finite(losses: Losses) -> str:
    """Which losses are NaN or infinite: `en, es (full); es (without es)`; empty where none is."""
    bad = {name: [c for c, loss in by.items() if not math.isfinite(loss)] for name, by in losses.items()}
    return "; ".join(f"{', '.join(categories)} ({name})" for name, categories in bad.items() if categories)


def category_losses(*arguments, **options) -> Losses:
    """The losses of `category_losses_and_norms`."""
    return category_losses_and_norms(*arguments, **options)[0]
