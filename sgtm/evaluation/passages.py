"""The loss of every token in a few held-out passages, with and without the domains: what removal changes, word by word.

A passage is a sequence of the evaluation. A domain's own passages are compared with the model without that domain,
all others with the model without any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from sgtm.data.batch import IGNORE, Batch
from sgtm.data.loader import evaluation_batches
from sgtm.evaluation.subject import Subject
from sgtm.masking.labels import removal_name


class Passage(TypedDict):
    """tokens: their text, joined it is that of the passage; losses: of each token in nats, by condition (`full`,
    `without es`); None of one that is predicted from nothing."""

    category: str
    tokens: list[str]
    losses: dict[str, list[float | None]]


@torch.no_grad()
def passages(full: Subject, split: str, count: int = 2) -> list[Passage]:
    """`count` passages of each category that has text in the split; none where nothing is ever removed.

    full  the model with all domains
    """
    removals, shown = full.removals, []
    if len(removals) < 2:
        return []
    for category, label in full.corpus.categories.items():
        own = (label.removeprefix("forget:"),)
        removed = own if own in removals else removals[-1]
        models = {removal_name(which): full.without(*which) for which in ((), removed)}
        rows: list[Passage] = []
        for batch in evaluation_batches(full.corpus, full.config, split, category, max_sequences=count):
            losses = {name: _losses(model, batch) for name, model in models.items()}
            for row, ids in enumerate(batch.input_ids.tolist()):
                by_model = {name: [None, *by_row[row][:-1]] for name, by_row in losses.items()}
                end = max((i for i, loss in enumerate(by_model["full"]) if loss is not None), default=-1) + 1
                texts = token_texts(full.corpus.tokenizer, ids[:end])
                rows.append(
                    {"category": category, "tokens": texts, "losses": {n: of[:end] for n, of in by_model.items()}}
                )
        shown += [row for row in rows if row["tokens"]][:count]
    return shown


def _losses(model: Subject, batch: Batch) -> list[list[float | None]]:
    """Of every target of a micro-batch [B, S]; None where there is none."""
    ids, targets, plan = batch.on(model.device, model.tables)
    goals = targets.flatten()
    losses = torch.empty(len(goals))
    for part, logits in model.hidden(ids, plan).logits():
        losses[part] = torch.nn.functional.cross_entropy(
            logits, goals[part], ignore_index=IGNORE, reduction="none"
        ).cpu()
    rows = zip(losses.view_as(targets.cpu()).tolist(), targets.tolist(), strict=True)
    return [[None if target == IGNORE else round(loss, 4) for loss, target in zip(*row, strict=True)] for row in rows]


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Text of each token; of a character that several make up, that of the last of them."""
    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer, token) or "" for token in ids]
