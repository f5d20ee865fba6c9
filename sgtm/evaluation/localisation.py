"""Where the gradient of a kind of data wants to go: its norm on each group's weights, relative to the weights' norm.

Computed with nothing masked (strategy `none`), so that it shows where further training without masks would change the
weights, not what the masks let through; in fp32, as gradients of many micro-batches add up. It does not show what a
group has learned, which the losses with and without the group do: what is learned has little gradient left. A domain's
own embedding and head count among its weights, and take most of their norm.
"""

from __future__ import annotations

import math

import torch

from sgtm.config.schema import Config
from sgtm.data.batch import IGNORE
from sgtm.data.loader import evaluation_batches
from sgtm.data.store import Corpus
from sgtm.masking.strategy import build_tables
from sgtm.model.transformer import Transformer


def gradient_norms(
    model: Transformer, corpus: Corpus, config: Config, *, split: str, sequences: int | None, device: torch.device
) -> dict[str, dict[str, float]]:
    """{true label: {group: |gradient of the mean loss| / |weights|}} over the rows that each group owns.

    The gradient of a label is that of the mean loss over up to `sequences` sequences (None: all) of each of its
    categories.
    """
    tables = build_tables(config.space, "none")
    norms: dict[str, dict[str, float]] = {}
    by_label: dict[str, list[str]] = {}
    for category, label in corpus.categories.items():
        by_label.setdefault(label, []).append(category)
    for label, categories in by_label.items():
        model.zero_grad(set_to_none=True)
        count = 0.0
        for category in categories:
            for batch in evaluation_batches(corpus, config, split, category, max_sequences=sequences):
                ids, targets, plan = batch.on(device, tables)
                count += int((batch.targets != IGNORE).sum())
                model(ids, targets, plan, 1.0 / config.train.tokens_per_step)[0].backward()
        if count:
            norms[label] = _relative_norms(model, config.train.tokens_per_step / count)
    model.zero_grad(set_to_none=True)
    return norms


def _relative_norms(model: Transformer, factor: float) -> dict[str, float]:
    squares = {group: [0.0, 0.0] for group in model.partition.groups}
    parameters = dict(model.named_parameters())
    for name, rows in model.parameter_rows().items():
        for key, start, end in zip(rows.keys, rows.bounds[:-1], rows.bounds[1:], strict=True):
            group = key.rpartition(".")[2]
            if group in squares:
                parameter = parameters[name]
                assert parameter.grad is not None  # every group takes part in every loss
                squares[group][0] += float(parameter.grad[start:end].double().square().sum())
                squares[group][1] += float(parameter.detach()[start:end].double().square().sum())
    return {group: factor * math.sqrt(g / w) if w else 0.0 for group, (g, w) in squares.items()}
