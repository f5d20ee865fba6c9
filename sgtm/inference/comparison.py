"""Losses of two models on the same documents, token by token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from sgtm.evaluation.estimates import Estimate, of_documents
from sgtm.evaluation.passages import Passage
from sgtm.inference.text_losses import passage, token_losses
from sgtm.inference.text_model import TextModel


class LossTotal(NamedTuple):
    """sum: of all tokens, in nats. mean: nats per token, with its standard error over documents."""

    sum: float
    mean: Estimate


class TextComparison(NamedTuple):
    """names: of the two models. difference: the second minus the first; its error is that of the documents'
    differences. tokens: that have a loss. unpredicted: documents of less than two tokens, of which none has.
    passages: the first documents."""

    names: tuple[str, str]
    first: LossTotal
    second: LossTotal
    difference: LossTotal
    documents: int
    tokens: int
    unpredicted: int
    passages: list[Passage]


def compare_models(
    first: TextModel, second: TextModel, texts: Iterable[tuple[str, str]], shown: int = 3
) -> TextComparison:
    """Losses of both models on (where, text) of documents, read in pieces of the smaller context of the two.

    shown  documents that become passages, at most

    Raises ValueError for models of one name, or whose tokenizers differ, and where no document has two tokens.
    """
    if first.name == second.name:
        raise ValueError(f"{first.name} is compared with itself: give two models, or --remove DOMAIN")
    check_same_tokenizer(first, second)
    context = min(first.context, second.context)
    rows: list[list[float]] = []
    passages: list[Passage] = []
    unpredicted = 0
    for where, text in texts:
        ids = first.encode(text)
        if second.encode(text) != ids:
            raise ValueError(
                f"{where}: the tokenizers of {first.name} and {second.name} cut it into other tokens, so that their "
                f"losses are of different things; compare models of one tokenizer"
            )
        if len(ids) < 2:
            unpredicted += 1
            continue
        losses = {model.name: token_losses(model, ids, context) for model in (first, second)}
        rows.append([len(ids) - 1, *(float(values.double().sum()) for values in losses.values())])
        if len(passages) < shown:
            passages.append(passage(first, where, ids, losses))
    if not rows:
        raise ValueError("no document has two tokens, so that there is no loss; give a longer text")
    counts, before, after = torch.tensor(rows, dtype=torch.float64).unbind(1)
    names = first.name, second.name
    one, other, difference = (_total(sums, counts) for sums in (before, after, after - before))
    return TextComparison(names, one, other, difference, len(rows), int(counts.sum()), unpredicted, passages)


def _total(sums: torch.Tensor, counts: torch.Tensor) -> LossTotal:
    """sums, counts: float64 [documents]"""
    return LossTotal(float(sums.sum()), of_documents(sums, counts))


def check_same_tokenizer(first: TextModel, second: TextModel) -> None:
    """Raises ValueError where an id stands for different tokens in the two models."""
    ours, theirs = (model.tokenizer.get_vocab(with_added_tokens=True) for model in (first, second))
    if different := sorted({(i, token) for token, i in ours.items()} ^ {(i, token) for token, i in theirs.items()}):
        (i, _), count = different[0], len({i for i, _ in different})
        of_id = [
            repr(model.tokenizer.id_to_token(i)) if model.tokenizer.id_to_token(i) is not None else "nothing"
            for model in (first, second)
        ]
        raise ValueError(
            f"{first.name} and {second.name} have different tokenizers: {count:,} ids stand for other tokens, {i} for "
            f"{of_id[0]} and {of_id[1]}; per-token losses are not comparable across tokenizers"
        )
