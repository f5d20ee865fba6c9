"""Guided decoding between two constructed models, and weights extrapolated from two exports."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from subjects import bigram

from sgtm.evaluation.memorisation import recital
from sgtm.evaluation.pair import extrapolated, guided_recital

PASSAGE = [3, 1, 4, 5, 9, 2, 6, 8]


def pair() -> tuple:
    """A full model that prefers token 0 everywhere, and the ablated one, which lacks a slight hint of the passage."""
    full, ablated = torch.zeros(12, 12), torch.zeros(12, 12)
    full[:, 0] = ablated[:, 0] = 2
    for before, after in pairwise(PASSAGE):
        full[before, after] = 1
    return bigram(full), bigram(ablated)


def test_the_difference_of_two_models_recites_what_neither_does():
    full, ablated = pair()
    for model in (full, ablated):
        assert recital(model, [PASSAGE]).extraction_strength.value == 0
    assert guided_recital(full, ablated, [PASSAGE], 0.9).extraction_strength.value == 0
    assert guided_recital(full, ablated, [PASSAGE], 1.1).extraction_strength.value == pytest.approx(1 - 1 / 8)


@pytest.mark.parametrize(("strength", "which"), [(0.0, 0), (-1.0, 1)])
def test_the_ends_are_the_models_themselves(strength, which):
    torch.manual_seed(0)
    models = bigram(torch.randn(12, 12)), bigram(torch.randn(12, 12))
    texts = torch.randint(12, (20, 5)).tolist()
    assert guided_recital(*models, texts, strength) == recital(models[which], texts)


def test_texts_are_cut_to_the_context_of_both():
    """Behind it the ablated model would be asked for positions that it does not have."""
    full, ablated = pair()
    ablated.config.model.context = 4
    recited = guided_recital(full, ablated, [PASSAGE], 1.1)
    assert recited.extraction_strength.value == pytest.approx(1 - 1 / 4) and recited.texts == 1
    with pytest.raises(ValueError, match="text 1 has 1 token"):
        guided_recital(full, ablated, [PASSAGE, [3]], 1.0)


def test_models_of_different_vocabularies_are_an_error():
    with pytest.raises(ValueError, match="different vocabularies: 12 and 5"):
        guided_recital(bigram(torch.zeros(12, 12)), bigram(torch.zeros(5, 5)), [PASSAGE], 1.0)


def test_two_titrated_exports_give_the_full_model():
    torch.manual_seed(0)
    shared, group = torch.randn(4, 3), torch.randn(2, 3)
    exports = [{"w": torch.cat((shared, strength * group)), "steps": torch.tensor(7)} for strength in (0.0, 0.25, 1.0)]
    weights = extrapolated(exports[0], exports[1], (0.0, 0.25))
    assert torch.allclose(weights["w"], exports[2]["w"], atol=1e-6) and weights["w"].dtype == torch.float32
    assert int(weights["steps"]) == 7


def test_exports_that_make_no_line_are_an_error():
    state = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"both exports are at strength 0\.25"):
        extrapolated(state, state, (0.25, 0.25))
    with pytest.raises(ValueError, match="the exports differ in b, w"):
        extrapolated(state, {"w": torch.zeros(1, 3)}, (0.0, 0.25))
