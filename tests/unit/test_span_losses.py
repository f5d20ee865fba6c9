"""Losses of a corpus with labelled spans: each token counts for its own category, wherever it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from corpora import SPAN_LABELS, config_for, spanned_corpus

from sgtm.data.batch import IGNORE
from sgtm.data.loader import evaluation_batches
from sgtm.data.store import Corpus
from sgtm.evaluation.losses import evaluate
from sgtm.masking.strategy import removal_tables
from sgtm.model.transformer import Transformer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return spanned_corpus(tmp_path_factory.mktemp("spans") / "corpus")


@pytest.fixture(scope="module")
def config():
    return config_for(mixing="token")


@torch.no_grad()
def test_losses_are_means_over_the_tokens_of_a_category(corpus, config):
    torch.manual_seed(0)
    model = Transformer(config.model, config.partition, "torch")
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    losses = evaluate(model, corpus, config, split="test", sequences=None, device=torch.device("cpu")).losses
    for name, removed in (("full", ()), ("without es", ("es",))):
        tables = removal_tables(config.space, removed)
        assert losses[name].keys() == SPAN_LABELS.keys()
        for category, loss in losses[name].items():
            token_losses = []
            for batch in evaluation_batches(corpus, config, "test", category):
                logits = model.logits(batch.input_ids, batch.plan(tables)).flatten(0, 1)
                targets = batch.targets.flatten()
                measured = targets != IGNORE
                token_losses.append(F.cross_entropy(logits[measured], targets[measured], reduction="none"))
            assert loss == pytest.approx(float(torch.cat(token_losses).mean()), rel=1e-5)


def test_a_split_without_any_target_is_an_error_and_not_an_empty_evaluation(corpus, config, monkeypatch):
    monkeypatch.setattr("sgtm.evaluation.losses.evaluation_batches", lambda *_, **__: iter(()))
    with pytest.raises(ValueError, match=r"split test of .* has no token that follows another"):
        evaluate(None, corpus, config, split="test", sequences=None, device=torch.device("cpu"))
