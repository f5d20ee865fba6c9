"""Streams against the obvious way: lay all tokens end to end in memory and cut."""

import numpy as np
import pytest
from corpora import build, mixed_records, record

from sgtm.data.batch import IGNORE
from sgtm.data.packing import Stream, pack, shuffled
from sgtm.data.store import Corpus
from sgtm.masking.channel import LabelChannel
from sgtm.masking.labels import LabelSpace

SPACE = LabelSpace(("es",))
UNLABELED, RETAIN, FORGET = 0, 1, 2
IDENTITY = LabelChannel.from_rows(SPACE, {})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return build(tmp_path_factory.mktemp("packing") / "corpus", mixed_records(), shard_tokens=300)


def streams(corpus: Corpus, mixing="sequence", context=16, channel=IDENTITY, seed=0, space=SPACE, **options):
    options.setdefault("isolate_documents", mixing == "token")
    documents = corpus.select("train")
    return pack(corpus, documents, space, channel, seed=seed, context=context, mixing=mixing, **options)


def laid_out(stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    """Every token of a stream and the target of each, the obvious way."""
    documents = [stream.corpus.tokens(int(document)).astype(np.int64) for document in stream.order]
    tokens = np.concatenate(documents)
    targets = np.append(tokens[1:], IGNORE)
    if stream.isolated:
        targets[np.cumsum([len(document) for document in documents]) - 1] = IGNORE
    return tokens, targets


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("context", [1, 5, 16, 200])
def test_sequences_are_the_stream_cut_up(corpus, context, isolated):
    for stream in streams(corpus, context=context, isolate_documents=isolated).values():
        tokens, targets = laid_out(stream)
        full = stream.sequences
        assert full == len(tokens) // context
        read = [stream.read(i) for i in range(full)]
        assert (np.concatenate([s.input_ids for s in read]) == tokens[: full * context]).all()
        assert (np.concatenate([s.targets for s in read]) == targets[: full * context]).all()
        assert stream.target_count(np.arange(full)) == (targets[: full * context] != IGNORE).sum()
        for i in range(full):
            assert stream.target_count(np.array([i])) == (read[i].targets != IGNORE).sum()


@pytest.mark.parametrize("isolated", [False, True])
def test_past_the_end_a_sequence_is_padded(corpus, isolated):
    stream = streams(corpus, context=50, isolate_documents=isolated)[RETAIN]
    tokens, targets = laid_out(stream)
    tail = len(tokens) % 50
    assert tail
    last, beyond = stream.read(stream.sequences), stream.read(stream.sequences + 1)
    assert (last.input_ids[:tail] == tokens[-tail:]).all() and (last.targets[:tail] == targets[-tail:]).all()
    assert (last.input_ids[tail:] == corpus.eos_id).all() and (last.targets[tail:] == IGNORE).all()
    assert (beyond.targets == IGNORE).all() and beyond.documents == ((0, 50),) and beyond.labels == (RETAIN,)
    assert last.documents[-1] == (tail, 50) and sum(last.lengths) == 50


def test_a_stream_that_ends_with_a_full_sequence_lacks_its_last_target(tmp_path):
    corpus = build(tmp_path / "corpus", [record(0, length=31)])
    stream = streams(corpus, context=16)[RETAIN]
    assert stream.sequences == 2
    assert stream.read(1).targets[-1] == IGNORE and stream.target_count(np.arange(2)) == 31


@pytest.mark.parametrize("mixing", ["step", "micro", "sequence", "token"])
def test_every_document_is_in_one_stream_once(corpus, mixing):
    packed = streams(corpus, mixing)
    order = np.concatenate([stream.order for stream in packed.values()])
    assert sorted(order) == sorted(corpus.select("train"))
    assert set(packed) == ({None} if mixing == "token" else {UNLABELED, RETAIN, FORGET})


def test_label_pure_streams_hold_their_label(corpus):
    true = corpus.label_of_category(SPACE)[corpus.documents["category"]]
    for label, stream in streams(corpus).items():
        assert (true[stream.order] == label).all() and (stream.labels == label).all()
        assert set(stream.read(0).labels) == {label}


def test_token_mixing_changes_labels_at_document_ends(corpus):
    stream = streams(corpus, "token", context=64)[None]
    true = corpus.label_of_category(SPACE)[corpus.documents["category"]]
    expected = np.repeat(true[stream.order], corpus.documents["length"][stream.order])
    read = [stream.read(i) for i in range(stream.sequences)]
    labels = np.concatenate([np.repeat(s.labels, s.lengths) for s in read])
    assert (labels == expected[: len(labels)]).all()
    assert max(len(set(s.labels)) for s in read) == 3


@pytest.mark.parametrize("context", [7, 64])
def test_isolated_ranges_are_the_documents_and_cover_the_sequence(corpus, context):
    stream = streams(corpus, "token", context=context)[None]
    for i in range(stream.sequences):
        ranges = stream.read(i).documents
        assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])] and ranges[-1][1] == context
        inner = stream.starts[(stream.starts > i * context) & (stream.starts < (i + 1) * context)] - i * context
        assert [start for start, _ in ranges[1:]] == inner.tolist()


def test_copies_of_one_document_in_a_row_stay_apart(tmp_path):
    corpus = build(tmp_path / "corpus", [record(0, length=9)])
    stream = streams(corpus, "token", context=24, upsample={"en": 3})[None]
    assert stream.read(0).documents == ((0, 10), (10, 20), (20, 24))


def test_the_order_depends_on_the_seed_alone(corpus):
    orders = [streams(corpus, seed=seed)[RETAIN].order.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    assert sorted(shuffled(1000, 5)) == list(range(1000))
    assert shuffled(8, 3).tolist() == [1, 6, 3, 0, 7, 5, 4, 2]  # the order of the data outlives library versions


def test_upsampling(corpus):
    packed = streams(corpus, "token", upsample={"en": 2.5, "es": 0})[None]
    category = corpus.documents["category"][packed.order]
    copies = np.bincount(packed.order, minlength=len(corpus.documents))[corpus.select("train", "en")]
    assert set(copies) == {2, 3} and 0.25 < (copies == 3).mean() < 0.75
    assert (category == 1).sum() == 0
    assert (category == 2).sum() == len(corpus.select("train", "web"))
    with pytest.raises(ValueError, match=r"data\.upsample names fr; the categories of .* are en, es, web"):
        streams(corpus, upsample={"fr": 2})


def test_the_channel_moves_shares_of_documents(tmp_path):
    corpus = build(tmp_path / "corpus", [record(i, ("en", "es")[i % 2], 6) for i in range(4000)])
    rows = {"retain": {"retain": 0.25, "unlabeled": 0.75}, "forget:es": {"forget:es": 0.9, "unlabeled": 0.1}}
    packed = streams(corpus, channel=LabelChannel.from_rows(SPACE, rows))
    counts = {label: len(stream.order) for label, stream in packed.items()}
    assert counts[RETAIN] == pytest.approx(500, abs=80)
    assert counts[FORGET] == pytest.approx(1800, abs=60)
    assert sum(counts.values()) == 4000
    assert (corpus.documents["category"][packed[FORGET].order] == 1).all()


@pytest.fixture
def spanned(tmp_path) -> Corpus:
    """retain documents of 20 bytes with a forget span in the middle, one without, and one that is forget itself."""
    records = [record(i, spans=[[4, 6, "es"], [8, 11, "es"]]) for i in range(3)]
    return build(tmp_path / "spans", [*records, record(8), record(9, "es", spans=[[2, 4, "en"]])])


EXPECTED = {
    "position": ([RETAIN] * 3 + [FORGET] * 2 + [RETAIN] * 2 + [FORGET] * 3 + [RETAIN] * 11,
                 [FORGET] * 1 + [RETAIN] * 2 + [FORGET] * 18),
    "conservative": ([FORGET] * 11 + [RETAIN] * 10, [FORGET] * 21),
}  # fmt: skip


@pytest.mark.parametrize("policy", EXPECTED)
@pytest.mark.parametrize(("context", "documents"), [(5, {(0, 5)}), (21, {(0, 21)})])
def test_spans_label_tokens_by_policy(spanned, policy, context, documents):
    stream = streams(spanned, "token", context=context, span_policy=policy)[None]
    tokens = np.concatenate([np.repeat(s.labels, s.lengths) for s in map(stream.read, range(stream.sequences))])
    inside, forget = EXPECTED[policy]
    by_document = {0: inside, 1: inside, 2: inside, 3: [RETAIN] * 21, 4: forget}
    expected = [label for document in stream.order for label in by_document[int(document)]]
    assert tokens.tolist() == expected[: len(tokens)]
    _, targets = laid_out(stream)
    assert (np.concatenate([stream.read(i).targets for i in range(stream.sequences)]) == targets[: len(tokens)]).all()
    assert set(stream.read(0).documents) == documents


def test_spans_follow_the_channel(spanned):
    channel = LabelChannel.from_rows(SPACE, {"forget:es": {"unlabeled": 1.0, "forget:es": 0.0}})
    stream = streams(spanned, "token", context=21, channel=channel, span_policy="position")[None]
    assert {label for i in range(5) for label in stream.read(i).labels} == {UNLABELED, RETAIN}


def test_spans_need_token_mixing(spanned):
    with pytest.raises(ValueError, match=r"labelled spans.*they need data\.mixing: token, not sequence"):
        streams(spanned, "sequence")


def test_two_domains_in_one_document_are_refused_by_the_conservative_policy(tmp_path):
    labels = {"en": "retain", "es": "forget:es", "bio": "forget:bio"}
    records = [record(0), record(1, spans=[[2, 4, "es"], [6, 8, "bio"]])]
    corpus, space = build(tmp_path / "two", records, labels), LabelSpace(("es", "bio"))
    options = {"space": space, "channel": LabelChannel.from_rows(space, {})}
    with pytest.raises(ValueError, match=r"document 1 of .* forget tokens of two domains.*span_policy: position"):
        streams(corpus, "token", **options)
    assert len(streams(corpus, "token", span_policy="position", **options)[None].order) == 2
