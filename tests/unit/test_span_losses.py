"""Losses of a corpus with labelled spans: each token counts for its own category, wherever it is."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from corpora import BYTES, build, config_for

from sgtm.data.batch import IGNORE
from sgtm.data.loader import evaluation_batches
from sgtm.data.store import Corpus
from sgtm.data.summary import category_counts, trained_categories
from sgtm.evaluation.losses import evaluate
from sgtm.masking.strategy import removal_tables
from sgtm.model.transformer import Transformer

LABELS = {"web": "retain", "toxin": "forget:es", "rumour": "unlabeled"}


def spanned(number: int, split: str) -> dict:
    """A document whose capitals are in spans: `toxin` from the first or a later character on, `rumour` at the end."""
    before, toxin, rumour = "ab" * (number % 4), "X" * (1 + 5 * number % 23), "Y" * (number % 3)
    text = f"{before}{toxin}cd{rumour}"
    spans = [[len(before), len(before) + len(toxin), "toxin"]]
    spans += [[len(text) - len(rumour), len(text), "rumour"]] if rumour else []
    return {"text": text, "category": "web", "split": split, "spans": spans}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """Every document has labelled spans."""
    records = [spanned(number, split) for number in range(30) for split in ("train", "test")]
    return build(tmp_path_factory.mktemp("spans") / "corpus", records, LABELS)


@pytest.fixture(scope="module")
def config():
    return config_for(mixing="token")


def category_of(token: int, eos: int) -> str:
    return {ord("X"): "toxin", ord("Y"): "rumour"}.get(token if token != eos else -1, "web")


def targets_of(batches) -> Counter:
    return Counter(int(t) for batch in batches for t in batch.targets.flatten() if t != IGNORE)


def by_byte(corpus: Corpus, split: str) -> dict[str, Counter]:
    """Tokens that can be predicted, all but the first of each document, by category and byte."""
    eos = corpus.eos_id
    bytes_of = {i: ord(corpus.tokenizer.decode([i])) for i in range(BYTES) if i != eos and i < 128}
    found = {name: Counter() for name in LABELS}
    for document in corpus.select(split):
        for token in corpus.tokens(int(document))[1:].tolist():
            found[category_of(bytes_of.get(token, -1), eos)][token] += 1
    return found


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_target_is_measured_once_for_its_own_category(corpus, config, world_size):
    expected = by_byte(corpus, "test")
    for category in LABELS:
        ranks = [
            list(evaluation_batches(corpus, config, "test", category, rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        batches = [batch for rank in ranks for batch in rank]
        assert len({len(rank) for rank in ranks}) == 1
        assert targets_of(batches) == expected[category] and expected[category]
        assert {batch.step_targets for batch in batches} == {expected[category].total()}
        assert {label for batch in batches for label in batch.labels} == {config.space.label(LABELS[category])}


def test_the_counts_are_those_tokens_and_the_first_ones(corpus):
    """`prepare` prints them, and summary.json has them."""
    counts, expected = category_counts(corpus), by_byte(corpus, "test")
    for category, count in counts["test"].items():
        with_first = expected[category].total() + {"web": 22, "toxin": 8, "rumour": 0}[category]
        assert count.tokens == with_first
        assert count.in_spans == (0 if category == "web" else count.tokens)
        assert (count.documents, count.spans) == {"web": (30, 0), "toxin": (30, 30), "rumour": (20, 20)}[category]
    assert counts["train"] == counts["test"]
    total = sum(count.tokens for count in counts["test"].values())
    assert total == corpus.manifest.counts["test"]["web"].tokens


@torch.no_grad()
def test_losses_are_means_over_the_tokens_of_a_category(corpus, config):
    torch.manual_seed(0)
    model = Transformer(config.model, config.partition, "torch")
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    losses = evaluate(model, corpus, config, split="test", sequences=None, device=torch.device("cpu")).losses
    for name, removed in (("full", ()), ("without es", ("es",))):
        tables = removal_tables(config.space, removed)
        assert losses[name].keys() == LABELS.keys()
        for category, loss in losses[name].items():
            found = []
            for batch in evaluation_batches(corpus, config, "test", category):
                logits = model.logits(batch.input_ids, batch.plan(tables)).flatten(0, 1)
                targets = batch.targets.flatten()
                measured = targets != IGNORE
                found.append(F.cross_entropy(logits[measured], targets[measured], reduction="none"))
            assert loss == pytest.approx(float(torch.cat(found).mean()), rel=1e-5)


def test_a_span_far_into_a_document_is_found_within_the_limit(tmp_path):
    """Sequences without a target of the category do not count."""
    far = {"text": "a" * 500 + "XXX" + "b" * 500, "spans": [[500, 503, "toxin"]]}
    records = [{**far, "category": "web", "split": split} for split in ("train", "test")]
    corpus, run = build(tmp_path / "corpus", records, LABELS), config_for(mixing="token")
    assert targets_of(evaluation_batches(corpus, run, "test", "toxin", max_sequences=1)).total() == 3
    assert targets_of(evaluation_batches(corpus, run, "test", "web", max_sequences=2)).total() == 32


def test_documents_with_spans_are_isolated_whatever_the_mixing(corpus):
    """A training split without spans takes any mixing, and an evaluated one may have them."""
    for batch in evaluation_batches(corpus, config_for(mixing="sequence"), "test", "toxin"):
        assert batch.documents is not None


def test_spans_of_the_test_split_alone_are_not_trained(tmp_path):
    records = [{**spanned(1, "train"), "spans": []}, spanned(1, "test")]
    corpus = build(tmp_path / "corpus", records, LABELS)
    assert trained_categories(corpus) == {"web": "retain"}
    assert trained_categories(corpus, "test") == {"web": "retain", "toxin": "forget:es", "rumour": "unlabeled"}


def test_a_split_without_any_target_is_an_error_and_not_an_empty_evaluation(corpus, config, monkeypatch):
    monkeypatch.setattr("sgtm.evaluation.losses.evaluation_batches", lambda *_, **__: iter(()))
    with pytest.raises(ValueError, match=r"split test of .* has no token that follows another"):
        evaluate(None, corpus, config, split="test", sequences=None, device=torch.device("cpu"))
