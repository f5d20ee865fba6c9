"""Extraction strength, exact memorisation and membership of constructed models, whose values are known."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from corpora import build, config_for, record
from random_models import moved_model
from subjects import bigram, scores

from sgtm.evaluation.estimates import Estimate
from sgtm.evaluation.memorisation import extraction_strength, membership, min_k, recital, roc_area
from sgtm.evaluation.subject import Subject

PLANTED = [3, 1, 4, 5, 9, 2, 6, 8]


def reciting(passage: list[int], vocab: int = 12):
    """A model that continues each token of the passage with the next one, and anything else with token 0."""
    logits = torch.zeros(vocab, vocab)
    logits[:, 0] = 1
    for before, after in pairwise(passage):
        logits[before, after] = 5
    return bigram(logits)


def test_a_planted_passage_is_extracted_from_its_first_token():
    recited = recital(reciting(PLANTED), [PLANTED])
    assert recited.extraction_strength.value == pytest.approx(1 - 1 / 8)
    assert recited.exact_memorisation == Estimate(1.0, None) and recited.texts == 1


def test_a_passage_with_one_gap_is_extracted_behind_it():
    model = reciting(PLANTED)
    model.weight[9, 5] = 0  # 5 is not continued with 9, the fifth token
    recited = recital(model, [PLANTED])
    assert recited.extraction_strength.value == pytest.approx(1 - 5 / 8)
    assert recited.exact_memorisation.value == pytest.approx(6 / 7)


def test_a_model_that_knows_nothing_extracts_nothing():
    recited = recital(reciting([10, 11]), [PLANTED, PLANTED[::-1]])
    assert recited.extraction_strength == Estimate(0.0, 0.0)
    assert recited.exact_memorisation == Estimate(0.0, 0.0)


def test_texts_are_cut_to_the_context():
    model = reciting(PLANTED[:4])
    model.config.model.context = 4
    assert recital(model, [PLANTED]).extraction_strength.value == pytest.approx(1 - 1 / 4)


def test_a_text_of_one_token_is_an_error():
    with pytest.raises(ValueError, match="text 1 has 1 token"):
        recital(reciting(PLANTED), [PLANTED, [3]])
    with pytest.raises(ValueError, match="no document"):
        recital(reciting(PLANTED), [])


@pytest.mark.parametrize(
    ("hits", "expected"), [("1111", 0.8), ("0111", 0.6), ("1101", 0.2), ("1110", 0.0), ("0000", 0.0), ("1", 0.5)]
)
def test_extraction_strength(hits, expected):
    assert extraction_strength(torch.tensor([hit == "1" for hit in hits])) == pytest.approx(expected)


def test_the_greedy_continuation_is_what_a_prefix_of_that_length_gives():
    """Against decoding token by token, for random bigram models."""
    torch.manual_seed(0)
    for _ in range(50):
        logits, text = torch.randn(4, 4), torch.randint(4, (6,)).tolist()
        shortest = next(k for k in range(1, 7) if decoded(logits, text[:k], 6) == text)
        strength = recital(bigram(logits), [text]).extraction_strength.value
        assert strength == pytest.approx(1 - shortest / 6)


def decoded(logits: torch.Tensor, prefix: list[int], length: int) -> list[int]:
    while len(prefix) < length:
        prefix = [*prefix, int(logits[prefix[-1]].argmax())]
    return prefix


def test_min_k_is_the_mean_of_the_least_likely_tokens():
    of = scores([[0.1, 3.0, 0.2, 2.0, 0.3], [5.0], [1.0, 1.0]])
    assert min_k(of, 0.4).tolist() == pytest.approx([-2.5, -5.0, -1.0])
    assert min_k(of, 1.0).tolist() == pytest.approx([-5.6 / 5, -5.0, -1.0])
    assert min_k(of, 0.41).tolist() == pytest.approx([-5.3 / 3, -5.0, -1.0]), "rounded up"
    assert min_k(of, 0.2).tolist() == pytest.approx([-3.0, -5.0, -1.0])
    assert min_k(of).tolist() == min_k(of, 0.4).tolist(), "as published"


def test_membership_has_the_share_that_it_is_given(monkeypatch):
    shares = []
    monkeypatch.setattr(
        "sgtm.evaluation.memorisation.min_k", lambda scores, share: shares.append(share) or torch.tensor([1.0, 2.0])
    )
    subject = SimpleNamespace(scores=lambda split, category, sequences: None)
    membership(subject, "es")
    membership(subject, "es", share=0.1)
    assert shares == [0.4, 0.4, 0.1, 0.1]


def test_roc_area_counts_pairs():
    members, others = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2.0, 0.0])
    pairs = [1.0 if m > o else 0.5 if m == o else 0.0 for m in members.tolist() for o in others.tolist()]
    assert roc_area(members, others).value == pytest.approx(sum(pairs) / 6)
    assert roc_area(others + 10, members).value == 1.0 and roc_area(members, members).value == 0.5
    with pytest.raises(ValueError, match="0 members and 2 others"):
        roc_area(members[:0], others)


def test_the_error_of_an_area_is_that_of_other_documents():
    torch.manual_seed(1)
    areas = [roc_area(torch.randn(60) + 0.5, torch.randn(40)) for _ in range(300)]
    spread = float(torch.tensor([area.value for area in areas]).std())
    assert float(torch.tensor([area.error for area in areas]).mean()) == pytest.approx(spread, rel=0.15)


def test_membership_compares_the_documents_of_two_splits(tmp_path):
    documents = [record(n, "es", 30, "test" if n % 3 == 0 else "train") for n in range(30)]
    corpus, config = build(tmp_path / "corpus", documents), config_for(context=32)
    model = moved_model(config, 0.1)
    assert abs(membership(Subject(model, corpus, config, ("es",)), "es").value - 0.5) < 0.35
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    subject = Subject(model, corpus, config)
    for _ in range(60):
        for batch in subject.batches("train", "es", None):
            ids, targets, plan = batch.on(subject.device, subject.tables)
            optimizer.zero_grad()
            model(ids, targets, plan, 1 / targets.numel())[0].backward()
            optimizer.step()
    assert membership(subject, "es").value > 0.9
