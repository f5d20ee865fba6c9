"""Values with their standard errors over documents."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from sgtm.evaluation.losses import standard_error


class Estimate(NamedTuple):
    """A value and its standard error, None for a single document."""

    value: float
    error: float | None


def mean(values: torch.Tensor) -> Estimate:
    """Mean and standard error of [n] values, one for each document. Raises ValueError for none."""
    if not len(values):
        raise ValueError("no document to take a mean over")
    values = values.double()
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None)


def token_mean(losses: torch.Tensor, document: torch.Tensor) -> Estimate:
    """Mean over tokens, whose error counts the tokens of a document as one draw.

    losses, document  [tokens]; int64 numbers of 0 and more that differ between documents
    """
    return of_documents(*by_document(losses, document))


def by_document(losses: torch.Tensor, document: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of losses and numbers of tokens of each document, float64 [documents], on the CPU."""
    document = document.cpu()
    count = int(document.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, document, losses.cpu().double())
    return sums, document.bincount(minlength=count).double()


def of_documents(sums: torch.Tensor, counts: torch.Tensor) -> Estimate:
    """sums.sum() / counts.sum() of float64 [documents], with its error."""
    return Estimate(float(sums.sum() / counts.sum()), standard_error(sums, counts))
