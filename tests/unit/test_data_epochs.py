"""What an epoch holds, and what changes from one to the next."""

from collections import Counter
from math import ceil, floor

import numpy as np
import pytest
from corpora import build, config_for, mixed_records, record
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sgtm.data.loader import Loader
from sgtm.data.packing import pack
from sgtm.masking.channel import LabelChannel
from sgtm.masking.labels import LabelSpace

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
        refs = loader.sequences(step)
        (label,) = {ref.stream for ref in refs}
        key = (step // loader.order(0).blocks_per_epoch, label)
        blocks.setdefault(key, set()).add(frozenset(ref.sequence for ref in refs))
    assert [len(epoch_blocks) for epoch_blocks in blocks.values()] == [10] * 4
    assert len({frozenset(epoch_blocks) for epoch_blocks in blocks.values()}) == 4


@pytest.mark.parametrize("mixing", MIXINGS)
def test_an_epoch_holds_every_block_once(tmp_path, mixing):
    corpus = build(tmp_path / "corpus", mixed_records(120))
    loader = Loader(corpus, config_for(mixing=mixing, channel=CHANNEL, micro_blocks=2))
    blocks = loader.order(0).blocks_per_epoch * loader.order(0).block
    steps = 2 * blocks // loader.per_step
    refs = [ref for step in range(steps + 1) for ref in loader.sequences(step)]
    first, second = refs[:blocks], refs[blocks : 2 * blocks]
    assert len(set(first)) == len(set(second)) == blocks
    assert first != second
    if mixing != "token":
        assert [ref.stream for ref in first] != [ref.stream for ref in second]
    if loader.order(0).block == 1:
        assert blocks == sum(stream.sequences for stream in loader.order(0).streams.values())
        assert {ref[::2] for ref in first} == {ref[::2] for ref in second}


@pytest.mark.parametrize(("factor", "mixing"), [(0.3, "sequence"), (2.5, "sequence"), (0.5, "token")])
def test_a_fraction_of_the_documents_is_another_one_in_every_epoch(tmp_path, factor, mixing):
    """Documents of a sequence each: over ten epochs each comes as often as any other, but for what does not fit."""
    documents = [record(n, "en", 15, "train" if n else "test") for n in range(201)]
    documents += [record(n, "es", 15, "train" if n else "test") for n in range(41)]
    corpus = build(tmp_path / "corpus", documents)
    order = Loader(corpus, config_for(mixing=mixing, context=16, sequences=8, upsample={"en": factor})).order(0)
    epochs = [Counter() for _ in range(10)]
    for step in range(10 * order.blocks_per_epoch // 8):
        for ref in order.sequences(step):
            epochs[ref.epoch].update(piece.document for piece in order.pieces(ref))
    english = set(np.flatnonzero(corpus.documents["category"] == 0)) - {0}
    counts = Counter(dict.fromkeys(english, 0))
    for epoch in epochs:
        counts.update({document: n for document, n in epoch.items() if document in english})
        assert set(epoch.values()) <= {1, 2, int(factor), int(factor) + 1}
    assert sum(counts.values()) / len(english) == pytest.approx(10 * factor, rel=0.02)
    assert sum(abs(n - 10 * factor) > 1 for n in counts.values()) <= 0.05 * len(english)


@pytest.fixture(scope="module")
def two_categories(tmp_path_factory):
    documents = [record(number, category) for number in range(24) for category in ("en", "es")]
    return build(tmp_path_factory.mktemp("epochs") / "corpus", documents)


FACTORS = st.one_of(st.integers(1, 60).map(lambda n: n / 20), st.floats(0.01, 4), st.sampled_from([1 / 3, 2 / 3]))


@settings(max_examples=100, deadline=None)
@given(FACTORS, st.integers(1, 24), st.integers(0, 2**32), st.integers(0, 100), st.integers(1, 12))
@example(0.3, 5, 0, 0, 3)
@example(0.15, 5, 0, 7, 7)
def test_any_factor_holds_in_each_epoch_and_for_each_document(two_categories, factor, of, seed, first, epochs):
    """English `of` documents at this factor, Spanish as it is, in some epochs after the first."""
    english, spanish = (np.flatnonzero(two_categories.documents["category"] == n) for n in range(2))
    space = LabelSpace(("es",))
    options = {"seed": seed, "context": 16, "mixing": "sequence", "upsample": {"en": factor}}
    came = Counter()
    for epoch in range(first, first + epochs):
        documents = np.concatenate([english[:of], spanish])
        streams = pack(two_categories, documents, space, LabelChannel.from_rows(space, {}), epoch=epoch, **options)
        occurrences = Counter(document for stream in streams.values() for document in stream.order.tolist())
        copies = [occurrences.pop(document, 0) for document in english[:of]]
        assert occurrences == Counter(spanish.tolist())
        assert within(sum(copies), of * factor) and all(within(n, factor) for n in copies)
        came.update(dict(zip(english.tolist(), copies, strict=False)))
    assert all(within(came[document], epochs * factor) for document in english[:of])


def within(count: int, expected: float) -> bool:
    """Whether a count is what is expected, rounded up or down."""
    return floor(expected - 1e-6) <= count <= ceil(expected + 1e-6)


def test_no_document_lies_in_the_tail_of_every_epoch(tmp_path):
    corpus = build(tmp_path / "corpus", [record(n, "en", 14, "train" if n else "test") for n in range(32)])
    order = Loader(corpus, config_for(context=32, sequences=2, channel={})).order(0)
    (stream,) = order.streams.values()
    assert stream.tokens % 32 > 15  # a document at least
    seen = Counter()
    for step in range(20 * order.blocks_per_epoch // 2):
        seen.update({(ref.epoch, piece.document) for ref in order.sequences(step) for piece in order.pieces(ref)})
    missed = Counter(document for epoch in range(20) for document in stream.order if (epoch, document) not in seen)
    assert 20 <= missed.total() <= 40 and max(missed.values()) < 10
