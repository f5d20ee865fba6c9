"""Context gain of a model that counts the tokens before, whose losses follow by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from corpora import BYTES, build, record
from subjects import Rule, bigram

from sgtm.evaluation.in_context import _pieces, context_gain

CONTEXT = 32


def counting() -> Rule:
    """Predicts each token in proportion to 1 + how often it is in the context so far."""
    return Rule(
        lambda ids: (1.0 + F.one_hot(ids, BYTES).cumsum(1)).log().double().float(), torch.eye(BYTES), context=CONTEXT
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    texts = {"en": "abcdefghijklmnopqrst", "es": "ABCDEFGHIJKLMNOPQRST"}
    documents = [
        {**record(number, name), "text": text[number:] + text[:number], "split": "test"}
        for number in range(4)
        for name, text in texts.items()
    ]
    return build(tmp_path_factory.mktemp("context") / "corpus", [*documents, record(0), record(0, "es")])


def measured(subject: Rule, corpus, **options):
    subject.corpus = corpus
    return context_gain(subject, "es", "en", **options)


def test_a_model_that_copies_from_its_context_gains_what_it_can_copy(corpus):
    gain = measured(counting(), corpus)
    # Each passage has 16 letters, once each; behind 16 letters of the domain some are in the context already.
    behind_other = sum(math.log((BYTES + 16 + n) / 1) for n in range(1, 16)) / 15
    assert gain.behind_other.value == pytest.approx(behind_other, rel=1e-5)
    assert gain.alone.value == pytest.approx(sum(math.log(BYTES + n) for n in range(1, 16)) / 15, rel=1e-5)
    assert gain.gain.value == pytest.approx(gain.behind_other.value - gain.behind_own.value)
    assert 0.5 * math.log(2) < gain.gain.value <= math.log(2) and gain.passages == 4


def test_a_model_that_does_not_look_back_gains_nothing(corpus):
    gain = measured(bigram(torch.randn(BYTES, BYTES), context=CONTEXT), corpus)
    assert gain.gain.value == pytest.approx(0, abs=1e-5)
    assert gain.alone.value == pytest.approx(gain.behind_own.value, rel=1e-5)


def test_the_same_passages_are_taken_in_every_call(corpus):
    assert measured(counting(), corpus, passages=2) == measured(counting(), corpus, passages=2)
    assert measured(counting(), corpus, passages=2).passages == 2
    orders = {seed: [pieces.tolist() for pieces in both(corpus, seed)] for seed in range(4)}
    assert len({str(order) for order in orders.values()}) > 1, "another seed, other passages"
    assert all(sorted(map(tuple, order[0])) == sorted(map(tuple, orders[0][0])) for order in orders.values())
    alone = {seed: measured(counting(), corpus, passages=2, seed=seed).behind_own.value for seed in range(4)}
    assert len(set(alone.values())) > 1


def both(corpus, seed: int):
    """Passages of the domain, and of the other category."""
    subject = counting()
    subject.corpus = corpus
    return _pieces(subject, "test", "es", 16, seed), _pieces(subject, "test", "en", 16, seed)


def test_the_passages_are_of_the_split(corpus):
    with pytest.raises(ValueError, match=r"split train of .* has 1 document of es with 16 tokens or more"):
        measured(counting(), corpus, split="train")


def test_documents_must_fill_half_of_the_context(corpus):
    with pytest.raises(ValueError, match="0 documents of es with 32 tokens or more, half of the context"):
        measured(bigram(torch.zeros(BYTES, BYTES), context=64), corpus)
