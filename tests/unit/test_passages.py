"""Losses of single tokens: those of the evaluation, in the place of the token that they are of."""

from __future__ import annotations

import pytest
import torch
from corpora import build, config_for, record
from random_models import moved_model

from sgtm.evaluation.passages import passages
from sgtm.evaluation.subject import Subject


@pytest.fixture
def full(tmp_path) -> Subject:
    documents = [record(n, name, 20, "test" if n % 3 == 0 else "train") for n in range(24) for name in ("en", "es")]
    documents += [record(100, "web", 20)]  # nothing held out
    config = config_for(context=16)
    return Subject(moved_model(config, 0.1), build(tmp_path / "corpus", documents), config)


def test_losses_are_those_of_the_evaluation_shifted_to_their_token(full):
    shown = passages(full, "test")
    assert [(passage["category"], list(passage["losses"])) for passage in shown] == [
        (name, ["full", "without es"]) for name in ("en", "en", "es", "es")
    ]
    for category, removed in (("en", ()), ("es", ("es",))):
        first = next(passage for passage in shown if passage["category"] == category)
        losses = first["losses"]["without es" if removed else "full"]
        model = Subject(full.model, full.corpus, full.config, removed)
        assert losses[0] is None
        assert losses[1:] == pytest.approx(model.scores("test", category, 1).losses[:15].tolist(), abs=1e-4)
    assert first["losses"]["full"] != first["losses"]["without es"]


def test_passages_of_a_domain_are_compared_with_the_model_without_it(tmp_path):
    labels = {"en": "retain", "es": "forget:es", "fr": "forget:fr"}
    documents = [record(n, name, 20, split) for n, split in enumerate(("train", "test")) for name in labels]
    config = config_for(context=16, domains=["es", "fr"])
    full = Subject(moved_model(config, 0.1), build(tmp_path / "corpus", documents, labels), config)
    shown = {passage["category"]: list(passage["losses"])[1] for passage in passages(full, "test", 1)}
    assert shown == {"en": "without es,fr", "es": "without es", "fr": "without fr"}


def test_tokens_are_the_text(full):
    first = passages(full, "test")[0]
    read = next(full.batches("test", "en", 1)).input_ids[0].tolist()
    assert "".join(first["tokens"]) == full.corpus.tokenizer.decode(read, skip_special_tokens=False)
    assert len(first["tokens"]) == len(first["losses"]["full"]) == 16


def test_a_character_of_several_tokens_is_with_the_last(tmp_path):
    corpus = build(tmp_path / "corpus", [{"text": "añb" * 9, "category": "es", "split": s} for s in ("train", "test")])
    config = config_for(context=8)
    (passage,) = passages(Subject(moved_model(config, 0.1), corpus, config), "test", 1)
    assert passage["tokens"] == ["a", "", "ñ", "b", "a", "", "ñ", "b"]


def test_padding_is_no_passage(tmp_path):
    corpus = build(tmp_path / "corpus", [record(n, "es", 20, s) for n, s in enumerate(("train", "test"))])
    config = config_for(context=32)
    (passage,) = passages(Subject(moved_model(config, 0.1), corpus, config), "test")
    assert "".join(passage["tokens"]).rstrip(".").startswith("es000001") and len(passage["tokens"]) == 21


def test_a_model_without_masks_has_none(full):
    config = config_for(context=16, masking={"strategy": "none"})
    assert passages(Subject(full.model, full.corpus, config), "test") == []
    with torch.no_grad():
        assert passages(full, "test", 1)
