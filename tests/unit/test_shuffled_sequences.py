"""Sequences without end: every epoch has each of the training split once, in an order of its own."""

from __future__ import annotations

from collections import Counter

import pytest
from corpora import build, config_for, mixed_records

from sgtm.data.loader import evaluation_batches
from sgtm.data.shuffled_sequences import ShuffledSequences


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build(tmp_path_factory.mktemp("data") / "corpus", mixed_records())


def sequences_in(batches) -> Counter:
    return Counter(tuple(ids.tolist()) for batch in batches for ids in batch.input_ids)


def test_every_pass_has_each_training_sequence_once_in_an_order_of_its_own(corpus):
    config = config_for()
    sequences = ShuffledSequences(corpus, config, ["es"], 1, 7)
    count = len(sequences)
    passes = [[tuple(s.input_ids.tolist()) for s in sequences.take(i * count, count)] for i in range(2)]
    expected = sequences_in(evaluation_batches(corpus, config, "train", "es"))
    padding = (corpus.eos_id,) * 16
    for one in passes:
        assert Counter(one) == Counter({ids: n for ids, n in expected.items() if n and ids != padding})
    assert passes[0] != passes[1]
    across = [tuple(s.input_ids.tolist()) for s in sequences.take(count - 2, 4)]
    assert across == [*passes[0][-2:], *passes[1][:2]]
    again, other, elsewhere = (
        ShuffledSequences(corpus, config, ["es"], *order).take(0, count) for order in ((1, 7), (2, 7), (1, 8))
    )
    assert [tuple(s.input_ids.tolist()) for s in again] == passes[0]
    for another in (other, elsewhere):
        assert [tuple(s.input_ids.tolist()) for s in another] != passes[0]


def test_categories_come_in_proportion(corpus):
    sequences = ShuffledSequences(corpus, config_for(), ["es", "web"], 0, 7)
    counts = [len(ShuffledSequences(corpus, config_for(), [name], 0, 7)) for name in ("es", "web")]
    assert Counter(s.labels[0] for s in sequences.take(0, sum(counts))) == {2: counts[0], 0: counts[1]}
