"""Values with their errors over documents, by hand."""

from __future__ import annotations

import pytest
import torch

from sgtm.evaluation.estimates import Estimate, by_document, mean, token_mean


def test_mean_and_its_error():
    assert mean(torch.tensor([1.0, 3.0])) == Estimate(2.0, pytest.approx(1.0))
    assert mean(torch.tensor([3.0])) == Estimate(3.0, None)
    with pytest.raises(ValueError, match="no document"):
        mean(torch.tensor([]))


def test_the_mean_over_tokens_has_the_error_of_its_documents():
    """Documents of one and of two tokens, in any order: sums 3 and 3, mean 2, deviations 1 and -1 from it."""
    losses, document = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([4, 0, 4])
    sums, counts = by_document(losses, document)
    assert (sums.tolist(), counts.tolist()) == ([3.0, 0, 0, 0, 3.0], [1.0, 0, 0, 0, 2.0])
    assert token_mean(losses, document) == Estimate(2.0, pytest.approx((2 * 2) ** 0.5 / 3, rel=1e-4))
    assert token_mean(losses, torch.zeros(3, dtype=torch.int64)) == Estimate(pytest.approx(2.0), None)
