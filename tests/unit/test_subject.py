"""Scores of a subject against the losses of the evaluation, and logits in stretches."""

from __future__ import annotations

import pytest
import torch
from corpora import build, config_for, record
from random_models import moved_model

from sgtm.evaluation import subject as module
from sgtm.evaluation.losses import evaluate
from sgtm.evaluation.subject import Hidden, Subject


@pytest.fixture(scope="module", params=["none", "full"])
def subject(request, tmp_path_factory) -> Subject:
    pairs = [(n, c) for n in range(24) for c in ("en", "es")]
    documents = [record(n, c, 9 + 7 * n % 41, "test" if n % 3 == 0 else "train") for n, c in pairs]
    corpus = build(tmp_path_factory.mktemp("subject") / "corpus", documents)
    config = config_for(context=32, masking={"domain_embedding": request.param, "joint": "strict"})
    return Subject(moved_model(config, 0.1), corpus, config)


@pytest.mark.parametrize("removed", [(), ("es",)])
@pytest.mark.parametrize("category", ["en", "es"])
def test_scores_are_the_losses_of_the_evaluation(subject, removed, category):
    evaluation = evaluate(
        subject.model, subject.corpus, subject.config, split="test", sequences=5, device=torch.device("cpu")
    )
    scores = Subject(subject.model, subject.corpus, subject.config, removed).scores("test", category, 5)
    name = "without es" if removed else "full"
    assert float(scores.losses.double().mean()) == pytest.approx(evaluation.losses[name][category], rel=1e-5)
    measured = evaluation.sample["measured"][category]
    assert (len(scores.losses), len(scores.document.unique())) == (measured["tokens"], measured["documents"])


def test_without_a_domain_in_adapters_it_is_the_base(subject):
    other = moved_model(subject.config, 0.2)
    adapted = Subject(subject.model, subject.corpus, subject.config, bases={"es": other})
    assert adapted.removals == subject.removals == [(), ("es",)]
    base, ablated = adapted.without("es"), subject.without("es")
    assert (base.model, base.removed) == (other, ()) and (ablated.model, ablated.removed) == (subject.model, ("es",))
    assert adapted.without().model is subject.model
    unmasked = config_for(masking={"strategy": "none"})
    assert Subject(other, subject.corpus, unmasked).removals == [()]


def test_hits_are_the_most_likely_tokens(subject):
    (batch, *_) = subject.batches("test", "es", 3)
    ids, targets, plan = batch.on(subject.device, subject.tables)
    with torch.no_grad():
        logits = subject.model.logits(ids, plan)
    chosen = targets != -100
    expected = (logits.argmax(-1) == targets)[chosen]
    scores = module.scored(subject.hidden(ids, plan), targets, torch.zeros_like(ids))
    assert torch.equal(scores.hits, expected)


def test_logits_come_in_stretches(monkeypatch):
    monkeypatch.setattr(module, "LOGITS", 20)
    hidden = Hidden(torch.randn(7, 4), torch.randn(10, 4), torch.randn(10))
    parts = list(hidden.logits())
    assert [part for part, _ in parts] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    whole = torch.nn.functional.linear(hidden.x, hidden.weight, hidden.bias)
    assert torch.allclose(torch.cat([logits for _, logits in parts]), whole, atol=1e-6)


def test_a_category_without_documents_is_an_error(subject):
    with pytest.raises(ValueError, match=r"split test of .* has no document of category web"):
        subject.scores("test", "web")
    with pytest.raises(ValueError, match="split"):
        subject.scores("validation", "en")


def test_labels_with_different_heads_are_not_read_at_once(subject):
    if not subject.model.domain_parts:
        return
    (batch, *_) = subject.batches("test", "es", 2)
    tables = subject.config.tables
    ids, _, _ = batch.on(subject.device, tables)
    half = ids.numel() // 2
    mixed = module.MaskPlan(tables, (module.LabelRun(1, 0, half), module.LabelRun(2, half, ids.numel())), *ids.shape)
    with pytest.raises(ValueError, match="evaluate one category at a time"):
        subject.model.last_hidden(ids, mixed)
