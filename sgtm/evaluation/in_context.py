"""Whether a model uses a domain that is given to it in its context.

A safe model may know nothing of a domain and still be handed its text: in a prompt, by retrieval. Passages of the
domain are read three times: alone, behind other text of the domain, and behind as much text of another category. The
gain is the loss behind the other category minus that behind the domain, in nats per token of the passage: what the
domain in context is worth beyond any context at all. To be compared with a model that was trained without the domain,
which gains as much if the ablated one has nothing left that context brings back.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from sgtm.data.batch import IGNORE
from sgtm.data.store import Corpus
from sgtm.evaluation.estimates import Estimate, mean
from sgtm.evaluation.subject import Subject, scored
from sgtm.words import counted

BATCH = 16  # sequences of a forward pass


class ContextGain(NamedTuple):
    """Mean losses of the passages in nats per token, with their standard errors, by what stands before them."""

    alone: Estimate
    behind_other: Estimate
    behind_own: Estimate
    gain: Estimate
    passages: int


PASSAGES = 200


@torch.no_grad()
def context_gain(
    subject: Subject, category: str, other: str, *, split: str = "test", passages: int = PASSAGES, seed: int = 0
) -> ContextGain:
    """Of passages that fill half of the context, one from each of up to `passages` documents of a category.

    Raises ValueError where one of the categories has fewer than two documents of half a context in the split.
    """
    half = subject.config.model.context // 2
    own, others = (_pieces(subject, split, name, half, seed) for name in (category, other))
    count = min(passages, len(own), len(others))
    passage, before = own[:count], {"own": np.roll(own[:count], 1, axis=0), "other": others[:count]}
    losses = {
        "alone": _losses(subject, passage, 0),
        **{name: _losses(subject, np.concatenate([prompt, passage], 1), half) for name, prompt in before.items()},
    }
    gain = losses["other"] - losses["own"]
    alone, behind_other, behind_own = (mean(losses[name]) for name in ("alone", "other", "own"))
    return ContextGain(alone, behind_other, behind_own, mean(gain), count)


def long_documents(corpus: Corpus, split: str, category: str, length: int) -> np.ndarray:
    """Those with `length` tokens or more, half of a context. Raises ValueError for fewer than two."""
    documents = corpus.select(split, category)
    documents = documents[corpus.documents["length"][documents] >= length]
    if len(documents) < 2:
        raise ValueError(
            f"split {split} of {corpus.path} has {counted(len(documents), 'document')} of {category} with {length} "
            f"tokens or more, half of the context; the measure context needs two"
        )
    return documents


def _pieces(subject: Subject, split: str, category: str, length: int, seed: int) -> np.ndarray:
    """The first `length` tokens of each document that has as many, int64 [documents, length], in random order."""
    order = np.random.default_rng(seed).permutation(long_documents(subject.corpus, split, category, length))
    return np.stack([subject.corpus.tokens(int(document), 0, length).astype(np.int64) for document in order])


def _losses(subject: Subject, tokens: np.ndarray, first: int) -> torch.Tensor:
    """Mean loss of the tokens after the first one behind position `first`, float64 [sequences]."""
    means = []
    for rows in np.array_split(tokens, -(-len(tokens) // BATCH)):
        ids = torch.from_numpy(rows).to(subject.device)
        targets = torch.full_like(ids, IGNORE)
        targets[:, first:-1] = ids[:, first + 1 :]  # not the passage's first token: it follows other text
        number = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
        scores = scored(subject.hidden(ids, subject.plan(ids)), targets, number)
        means.append(scores.losses.double().view(len(ids), -1).mean(1))
    return torch.cat(means)
