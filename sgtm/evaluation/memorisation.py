"""Whether a model can recite: extraction strength, exact memorisation, and membership by Min-K%.

All three follow from one forward pass over each text, as greedy decoding continues with the text for as long as the
text's own next token is the most likely one. Of a text of T tokens, whose first token nothing predicts:

extraction strength   1 - k / T, with k the length of the shortest prefix from which greedy decoding gives the rest
                      exactly (Carlini et al. 2021, as measured by Dorna et al. 2025, arXiv 2506.12618)
exact memorisation    share of the T - 1 predicted tokens that are the most likely one (Tirumala et al. 2022)
Min-K%                mean log-probability of the K % least likely tokens of a document (Shi et al. 2024,
                      arXiv 2310.16789). The area under the ROC curve is the probability that a document of the
                      training split scores above one of the held-out split. 0.5: membership cannot be seen. Splits may
                      differ for other reasons (other books, other years), so compare with a model that was trained
                      without the category.

Errors are standard errors over documents: of a mean the usual one, of the area that of DeLong et al. (1988).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from sgtm.evaluation.estimates import Estimate, mean
from sgtm.evaluation.subject import Scores, Subject

MIN_K = 0.4  # share of a document's tokens


class Recital(NamedTuple):
    """Extraction strength and exact memorisation of some texts, means over the texts."""

    extraction_strength: Estimate
    exact_memorisation: Estimate
    texts: int


def extraction_strength(hits: torch.Tensor) -> float:
    """Of a text of T tokens; hits: bool [T - 1], whether each token after the first is the most likely one."""
    misses = (~hits).nonzero().flatten()
    prefix = int(misses[-1]) + 2 if len(misses) else 1
    return 1 - prefix / (len(hits) + 1)


@torch.no_grad()
def recital(subject: Subject, texts: Sequence[Sequence[int]]) -> Recital:
    """Of texts as token ids, each cut to the context.

    Raises ValueError for no text, and for a text of less than two tokens.
    """

    def likeliest(ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([logits.argmax(-1) for _, logits in subject.hidden(ids, subject.plan(ids)).logits()])

    return recited(texts, likeliest, subject.config.model.context, subject.device)


def recited(
    texts: Sequence[Sequence[int]],
    likeliest: Callable[[torch.Tensor], torch.Tensor],
    context: int,
    device: torch.device,
) -> Recital:
    """As `recital`; likeliest: of int64 [1, S] ids on the device, the most likely next tokens, int64 [S]."""
    by_text = []
    for number, text in enumerate(texts):
        ids = torch.tensor([text[:context]], dtype=torch.int64, device=device)
        if ids.shape[1] < 2:
            raise ValueError(f"text {number} has {ids.shape[1]} token: nothing of it can be predicted")
        by_text.append((likeliest(ids)[:-1] == ids[0, 1:]).cpu())
    strengths = torch.tensor([extraction_strength(hits) for hits in by_text])
    exact = torch.tensor([float(hits.float().mean()) for hits in by_text])
    return Recital(mean(strengths), mean(exact), len(by_text))


def min_k(scores: Scores, share: float = MIN_K) -> torch.Tensor:
    """float64 [documents]: mean log-probability of the `share` of a document's targets that are least likely."""
    numbers, index = scores.document.unique(return_inverse=True)
    order = scores.losses.argsort(descending=True, stable=True)
    order = order[index[order].argsort(stable=True)]  # by document, the largest losses first
    counts = index.bincount(minlength=len(numbers))
    chosen = (counts * share).ceil().clamp(min=1).long()
    rank = torch.arange(len(order)) - (counts.cumsum(0) - counts)[index[order]]
    taken = order[rank < chosen[index[order]]]
    sums = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, index[taken], -scores.losses[taken].double())
    return sums / chosen


def roc_area(members: torch.Tensor, others: torch.Tensor) -> Estimate:
    """Probability that a member scores above another, ties by half; members, others: [n] scores.

    Raises ValueError where one of them is empty.
    """
    if not len(members) or not len(others):
        raise ValueError(f"{len(members)} members and {len(others)} others: an area needs both")
    members, others = members.double(), others.double()
    below_members, below_others = (_below(a, b) / len(b) for a, b in ((members, others), (others, members)))
    if min(len(members), len(others)) < 2:
        return Estimate(float(below_members.mean()), None)
    variance = below_members.var() / len(members) + below_others.var() / len(others)
    return Estimate(float(below_members.mean()), float(variance.sqrt()))


def _below(values: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """How many of `others` are below each value, ties by half."""
    ordered = others.sort().values
    return (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)).double() / 2


def membership(subject: Subject, category: str, sequences: int | None = None, share: float = MIN_K) -> Estimate:
    """The area for documents of a category in the splits `train` and `test`."""
    train, test = (min_k(subject.scores(split, category, sequences), share) for split in ("train", "test"))
    return roc_area(train, test)
