"""How far losses would be off with other documents of the same kind: their standard errors.

Tokens of one document resemble one another, so the documents are what is drawn, and not the tokens. A mean loss over
tokens is a ratio of two sums over documents, and its error that of the ratio estimator (Cochran, Sampling Techniques,
1977, section 6.4): with s_d the sum of a document's losses, n_d its targets and m the mean loss,

    error^2 = D / (D - 1) * sum_d (s_d - m n_d)^2 / (sum_d n_d)^2        D documents

The error of a difference between two conditions on the same documents is that of the documents' differences, which is
far smaller than the errors of the two losses. Other seeds of the training are not in any of them.
"""

from __future__ import annotations

import math

import torch

from sgtm.data.batch import IGNORE, Owners


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
