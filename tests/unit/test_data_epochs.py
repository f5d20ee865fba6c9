"""What an epoch holds, and what changes from one to the next.

Faults tried, each seen to fail: the same fraction of upsampled documents in every epoch; the same order of documents,
whose last ones then always lie in the tail that fills no sequence.
"""

from collections import Counter

import numpy as np
import pytest
from corpora import build, config_for, mixed_records, record

from sgtm.data.loader import Loader

MIXINGS = ("step", "micro", "sequence", "token")
CHANNEL = {"retain": {"retain": 0.5, "unlabeled": 0.5}}


def test_sequences_meet_others_in_every_epoch_and_under_every_label(tmp_path):
    """Blocks of 4 sequences: which ones share a block is drawn anew for each epoch and each label."""
    documents = [record(n, category, 31, "train" if n else "test") for n in range(41) for category in ("en", "es")]
    corpus = build(tmp_path / "corpus", documents)
    loader = Loader(corpus, config_for(context=32, sequences=4, mixing="step"))
    assert {stream.sequences for stream in loader.order(0).streams.values()} == {40}
    blocks: dict[tuple[int, int], set[frozenset]] = {}
    for step in range(2 * loader.order(0).blocks_per_epoch):
        places = loader.sequences(step)
        (label,) = {place.stream for place in places}
        key = (step // loader.order(0).blocks_per_epoch, label)
        blocks.setdefault(key, set()).add(frozenset(place.sequence for place in places))
    assert [len(found) for found in blocks.values()] == [10] * 4
    assert len({frozenset(found) for found in blocks.values()}) == 4


@pytest.mark.parametrize("mixing", MIXINGS)
def test_an_epoch_holds_every_block_once(tmp_path, mixing):
    corpus = build(tmp_path / "corpus", mixed_records(120))
    loader = Loader(corpus, config_for(mixing=mixing, channel=CHANNEL, micro_blocks=2))
    blocks = loader.order(0).blocks_per_epoch * loader.order(0).block
    steps = 2 * blocks // loader.per_step
    places = [place for step in range(steps + 1) for place in loader.sequences(step)]
    first, second = places[:blocks], places[blocks : 2 * blocks]
    assert len(set(first)) == len(set(second)) == blocks
    assert first != second
    if mixing != "token":
        assert [place.stream for place in first] != [place.stream for place in second]
    if loader.order(0).block == 1:
        assert blocks == sum(stream.sequences for stream in loader.order(0).streams.values())
        assert {place[::2] for place in first} == {place[::2] for place in second}


@pytest.mark.parametrize(("factor", "mixing"), [(0.3, "sequence"), (2.5, "sequence"), (0.5, "token")])
def test_a_fraction_of_the_documents_is_another_one_in_every_epoch(tmp_path, factor, mixing):
    """Documents of a sequence each: over ten epochs each comes as often as any other, but for what does not fit."""
    documents = [record(n, "en", 15, "train" if n else "test") for n in range(201)]
    documents += [record(n, "es", 15, "train" if n else "test") for n in range(41)]
    corpus = build(tmp_path / "corpus", documents)
    order = Loader(corpus, config_for(mixing=mixing, context=16, sequences=8, upsample={"en": factor})).order(0)
    epochs = [Counter() for _ in range(10)]
    for step in range(10 * order.blocks_per_epoch // 8):
        for place in order.sequences(step):
            epochs[place.epoch].update(piece.document for piece in order.pieces(place))
    english = set(np.flatnonzero(corpus.documents["category"] == 0)) - {0}
    counts = Counter(dict.fromkeys(english, 0))
    for epoch in epochs:
        counts.update({document: n for document, n in epoch.items() if document in english})
        assert set(epoch.values()) <= {1, 2, int(factor), int(factor) + 1}
    assert sum(counts.values()) / len(english) == pytest.approx(10 * factor, rel=0.02)
    assert sum(abs(n - 10 * factor) > 1 for n in counts.values()) <= 0.05 * len(english)


def test_no_document_lies_in_the_tail_of_every_epoch(tmp_path):
    corpus = build(tmp_path / "corpus", [record(n, "en", 14, "train" if n else "test") for n in range(32)])
    order = Loader(corpus, config_for(context=32, sequences=2, channel={})).order(0)
    (stream,) = order.streams.values()
    assert stream.tokens % 32 > 15  # a document at least
    seen = Counter()
    for step in range(20 * order.blocks_per_epoch // 2):
        seen.update({(place.epoch, piece.document) for place in order.sequences(step) for piece in order.pieces(place)})
    missed = Counter(document for epoch in range(20) for document in stream.order if (epoch, document) not in seen)
    assert 20 <= missed.total() <= 40 and max(missed.values()) < 10
