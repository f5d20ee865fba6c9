"""Leakage of models whose ablated loss is known: none, all, and what lies between."""

from __future__ import annotations

import math

import pytest

from sgtm.evaluation.leakage import TokenCurve, leakage

TOKENS = (0, 1e4, 3e4, 1e5, 3e5, 1e6)


def loss_of(tokens: float) -> float:
    """Of a standard model that was trained on so many forget tokens."""
    return 2 + 5 * (1 + tokens / 1e4) ** -0.3


@pytest.fixture
def curve() -> TokenCurve:
    return TokenCurve(TOKENS, [loss_of(count) for count in TOKENS])


def test_knowledge_in_the_domains_group_alone_leaks_nothing(curve):
    """Ablated, the model is that which has seen no forget text, or worse."""
    for loss in (loss_of(0), loss_of(0) + 1):
        assert leakage(loss, curve, 2e5) == (0.0, None, None, 0.0, False)


def test_ignored_labels_leak_everything(curve):
    """The ablated model is then the standard model that was trained on what was not labelled."""
    for undiscovered in (1e4, 3e4, 1e5, 1e6):
        measured = leakage(loss_of(undiscovered), curve, undiscovered)
        assert measured.ratio == pytest.approx(1, rel=1e-6) and not measured.extrapolated
    assert leakage(loss_of(6e4), curve, 6e4).ratio == pytest.approx(1, rel=0.05)  # between two models of the curve
    assert leakage(loss_of(2e6), curve, 2e6).extrapolated


def test_token_equivalent_below_the_first_model_is_a_straight_line(curve):
    middle = (loss_of(0) + loss_of(1e4)) / 2
    assert leakage(middle, curve, 1e5).tokens == pytest.approx(5e3)


def test_models_no_better_than_the_unseen_one_make_no_jump():
    """Those of 1e4 tokens and fewer: a loss just below the unseen one is worth next to nothing, not 1e4 tokens."""
    losses = [loss_of(2e4), *(loss_of(count) for count in TOKENS[1:])]
    curve = TokenCurve(TOKENS, losses)
    assert leakage(losses[0] - 1e-6, curve, 1e5).tokens < 1
    middle = (losses[0] + loss_of(3e4)) / 2
    assert leakage(middle, curve, 1e5).tokens == pytest.approx(1.5e4)


def test_the_error_of_the_loss_is_that_of_the_equivalent(curve):
    measured = leakage(loss_of(1e5), curve, 1e5, error=0.1)
    assert measured.low == pytest.approx(curve.equivalent(loss_of(1e5) + 0.1)[0]) and measured.low < measured.tokens
    assert measured.high == pytest.approx(curve.equivalent(loss_of(1e5) - 0.1)[0]) and measured.high > measured.tokens


def test_without_undiscovered_tokens_there_is_no_ratio(curve):
    assert leakage(4.0, curve, 0).ratio is None and leakage(4.0, curve, 0).tokens > 0


def test_what_a_curve_needs():
    losses = [loss_of(count) for count in TOKENS]
    with pytest.raises(ValueError, match="0 forget tokens; it has 0"):
        TokenCurve(TOKENS[1:], losses[1:])
    with pytest.raises(ValueError, match="needs 3 evaluations"):
        TokenCurve(TOKENS[:3], losses[:3])
    with pytest.raises(ValueError, match="loss on forget data is nan"):
        leakage(math.nan, TokenCurve(TOKENS, losses), 1.0)
