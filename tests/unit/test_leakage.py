"""Leakage of models whose ablated loss is known: none, all, and what lies between.

Beside losses that are given there are models of which it is known where they hold what: whatever they read, they
predict each token as often as the logits of one column of embedding and head have it, to which a domain's own part adds
its column where the group is active.
"""

from __future__ import annotations

import math

import pytest
import torch
from corpora import build, config_for, mixed_records

from sgtm.evaluation.leakage import TokenCurve, leakage
from sgtm.evaluation.losses import evaluate
from sgtm.model.transformer import Transformer

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


@pytest.fixture(scope="module")
def losses_of(tmp_path_factory):
    """A function from what the shared weights and the domain's group have each counted of the domain's text, in tokens,
    to the held-out losses of the full and of the ablated model on it."""
    corpus = build(tmp_path_factory.mktemp("leakage") / "corpus", mixed_records())
    config = config_for(masking={"domain_embedding": "full"})
    tokens = torch.cat([torch.tensor(corpus.tokens(n).astype("int64")) for n in corpus.select("train", "es")])
    counts = tokens.bincount(minlength=config.model.vocab_size)

    @torch.no_grad()
    def losses(shared: float, of_group: float) -> tuple[float, float]:
        model = Transformer(config.model, config.partition, "reference")
        for parameter in model.parameters():
            parameter.zero_()
        model.final_norm.bias[0] = 1
        logits = [(1 + tokens * counts / counts.sum()).log() for tokens in (shared, shared + of_group)]
        model.embedding[:, 0] = logits[0]
        model.embedding_1[:, 0] = logits[1] - logits[0]
        sample = {"split": "test", "sequences": None, "device": torch.device("cpu")}
        measured = evaluate(model, corpus, config, **sample).losses
        return measured["full"]["es"], measured["without es"]["es"]

    return losses


def test_of_models_it_is_what_the_shared_weights_hold(losses_of):
    """Knowledge in the group alone leaks nothing, shared weights that saw all that was undiscovered leak all of it, and
    those that saw a quarter a quarter, however much the full model knows."""
    tokens = (0, 25, 50, 100, 200, 400, 800, 1600)
    curve = TokenCurve(tokens, [losses_of(count, 0)[0] for count in tokens])
    for shared, ratio in ((0, 0), (100, 0.25), (400, 1)):
        full, ablated = losses_of(shared, 1600 - shared)
        assert full == pytest.approx(losses_of(1600, 0)[0], abs=1e-5)
        assert leakage(ablated, curve, 400).ratio == pytest.approx(ratio, abs=1e-4)


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
    with pytest.raises(ValueError, match="0 forget tokens; it has 2"):
        TokenCurve([*TOKENS, 0], [*losses, losses[0]])
    with pytest.raises(ValueError, match="needs 3 evaluations"):
        TokenCurve(TOKENS[:3], losses[:3])
    for loss in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"loss on forget data is {loss}"):
            leakage(loss, TokenCurve(TOKENS, losses), 1.0)
