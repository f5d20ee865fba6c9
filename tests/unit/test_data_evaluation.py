"""What a category's loss is measured on: each token counts for its own category, wherever it is."""

from __future__ import annotations

from collections import Counter

import pytest
from corpora import BYTES, SPAN_LABELS, build, config_for, mixed_records, spanned_corpus

from sgtm.data.batch import IGNORE
from sgtm.data.evaluation import sequences_of
from sgtm.data.loader import evaluation_batches
from sgtm.data.store import Corpus
from sgtm.data.summary import category_counts


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return spanned_corpus(tmp_path_factory.mktemp("spans") / "corpus")


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
    counts = {name: Counter() for name in SPAN_LABELS}
    for document in corpus.select(split):
        for token in corpus.tokens(int(document))[1:].tolist():
            counts[category_of(bytes_of.get(token, -1), eos)][token] += 1
    return counts


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_target_is_measured_once_for_its_own_category(corpus, config, world_size):
    expected = by_byte(corpus, "test")
    for category in SPAN_LABELS:
        ranks = [
            list(evaluation_batches(corpus, config, "test", category, rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        batches = [batch for rank in ranks for batch in rank]
        assert len({len(rank) for rank in ranks}) == 1
        assert targets_of(batches) == expected[category] and expected[category]
        assert {batch.step_targets for batch in batches} == {expected[category].total()}
        assert {label for batch in batches for label in batch.labels} == {config.space.label(SPAN_LABELS[category])}


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


def test_a_span_far_into_a_document_is_found_within_the_limit(tmp_path):
    """Sequences without a target of the category do not count."""
    far = {"text": "a" * 500 + "XXX" + "b" * 500, "spans": [[500, 503, "toxin"]]}
    records = [{**far, "category": "web", "split": split} for split in ("train", "test")]
    corpus, run = build(tmp_path / "corpus", records, SPAN_LABELS), config_for(mixing="token")
    assert targets_of(evaluation_batches(corpus, run, "test", "toxin", max_sequences=1)).total() == 3
    assert targets_of(evaluation_batches(corpus, run, "test", "web", max_sequences=2)).total() == 32


def test_documents_with_spans_are_isolated_whatever_the_mixing(corpus):
    """A training split without spans takes any mixing, and an evaluated one may have them."""
    for batch in evaluation_batches(corpus, config_for(mixing="sequence"), "test", "toxin"):
        assert batch.documents is not None


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Corpus:
    """No document has labelled spans."""
    return build(tmp_path_factory.mktemp("plain") / "corpus", mixed_records())


def measured_targets(measured) -> int:
    return sum(
        int((measured.sequence(position, 7).targets != IGNORE).sum()) for position in range(len(measured.numbers))
    )


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("limit", [None, 2])
def test_the_targets_are_counted_without_reading_them(corpus, plain, isolated, limit):
    for source, category in ((plain, "en"), (corpus, "web"), (corpus, "rumour")):
        measured = sequences_of(source, "test", category, 16, isolated, limit)
        assert measured.targets == measured_targets(measured) > 0
        assert len(measured.numbers) == 2 or limit is None


def test_all_pieces_of_a_sequence_have_the_label_asked_for(corpus):
    read = sequences_of(corpus, "test", "toxin", 16, False).sequence(0, 7)
    assert set(read.labels) == {7} and len(read.labels) == len(read.lengths) > 1


def test_past_the_end_a_sequence_holds_padding_alone(corpus, plain):
    for source, category in ((plain, "es"), (corpus, "toxin")):
        measured = sequences_of(source, "test", category, 16, False, limit=1)
        assert len(measured.numbers) == 1 and measured.number(0) == measured.numbers[0]
        assert (measured.sequence(1, 7).targets == IGNORE).all()
        assert (measured.sequence(1, 7).input_ids == source.eos_id).all()


@pytest.mark.parametrize(("split", "category"), [("dev", "en"), ("test", "fr")])
def test_a_split_or_category_that_the_corpus_does_not_have_is_refused(plain, split, category):
    with pytest.raises(ValueError, match=r"no split 'dev'|no category 'fr'"):
        sequences_of(plain, split, category, 16, False)
