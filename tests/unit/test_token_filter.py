"""The token filter: what is no target, what is hidden, and that nothing else changes.

Expected values come from arrays of labels, a token at a time, of documents whose spans are drawn at random.
"""

from __future__ import annotations

import copy
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from corpora import build, config_for, record
from families import gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from sgtm.config.schema import Config
from sgtm.data.batch import IGNORE, Batch
from sgtm.data.loader import Loader, evaluation_batches
from sgtm.data.packing import Stream
from sgtm.data.store import SPAN, Corpus
from sgtm.masking.channel import LabelChannel
from sgtm.model.transformer import Transformer

LABELS = {"en": "retain", "es": "forget:es", "bio": "forget:bio", "web": "unlabeled"}
FILTERS = ("off", "loss", "hide")
CHANNEL = {"forget:es": {"forget:es": 0.6, "retain": 0.4}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Corpus:
    """Documents of 10 to 40 tokens of four categories, two of them domains; no spans yet."""
    records = [
        record(number, category, 9 + 7 * number % 31, "test" if number == 0 else "train")
        for number in range(12)
        for category in LABELS
    ]
    return build(tmp_path_factory.mktemp("filter") / "corpus", records, LABELS)


@st.composite
def spans_of(draw, corpus: Corpus) -> np.ndarray:
    """Spans of any category in some documents, next to one another, at the first token and up to EOS, too."""
    spans = []
    for document, length in enumerate(corpus.documents["length"].tolist()):
        cuts = sorted(draw(st.sets(st.integers(0, length), max_size=4)))
        for start, end in pairwise(cuts):
            if draw(st.booleans()):
                spans.append((document, start, end, draw(st.integers(0, len(LABELS) - 1))))
    return np.array(spans, SPAN)


def with_spans(corpus: Corpus, spans: np.ndarray) -> Corpus:
    other = copy.copy(corpus)
    other.spans = spans
    return other


def config(token_filter: str = "off", **options) -> Config:
    masking = {"strategy": "none", "span_policy": "position"}
    options = {"domains": ("es", "bio"), "mixing": "token", "channel": CHANNEL, **options}
    return config_for(masking=masking, token_filter=token_filter, **options)


def stream_of(corpus: Corpus, run: Config) -> Stream:
    return Loader(corpus, run).order(0).streams[None]


def applied(corpus: Corpus, run: Config, stream: Stream) -> np.ndarray:
    """The label of every token of the stream itself, by document and span, after the channel."""
    space, channel = run.space, LabelChannel.from_rows(run.space, run.data.channel)
    true, labels = corpus.label_of_category(space), []
    for document in stream.order.tolist():
        row = corpus.documents[document]
        own = np.full(row["length"], row["category"])
        for span in corpus.spans[corpus.spans["document"] == document]:
            own[span["start"] : span["end"]] = span["category"]
        ids = np.full(len(own), row["id"])
        passes, of_tokens = channel.apply(true[own], ids, run.data.seed)
        assert (passes == np.arange(len(own))).all()
        labels.append(of_tokens)
    return np.concatenate(labels)


def read(stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    sequences = [stream.read(number) for number in range(stream.sequences)]
    return tuple(np.concatenate([getattr(s, part) for s in sequences]) for part in ("input_ids", "targets"))


@given(data=st.data(), context=st.sampled_from([1, 5, 16, 33]), token_filter=st.sampled_from(["loss", "hide"]))
@settings(max_examples=30, deadline=None)
def test_forget_tokens_are_no_targets_and_all_others_stay(plain, data, context, token_filter):
    corpus = with_spans(plain, data.draw(spans_of(plain)))
    run = config(token_filter, context=context)
    stream, unfiltered = stream_of(corpus, run), stream_of(corpus, config(context=context))
    labels = applied(corpus, run, stream)
    forget = np.isin(labels, run.space.forget_labels)
    ids, targets = read(unfiltered)
    of_target = np.append(forget[1:], False)[: len(ids)]  # whether the next token is a forget one
    hidden = forget[: len(ids)] & (token_filter == "hide")
    filtered_ids, filtered_targets = read(stream)
    assert (filtered_targets == np.where(of_target, IGNORE, targets)).all()
    assert (filtered_ids == np.where(hidden, corpus.eos_id, ids)).all()
    assert (stream.order == unfiltered.order).all() and stream.pieces(0) == unfiltered.pieces(0)
    for numbers in (np.arange(stream.sequences), np.array([0]), np.array([2, 1])):
        real = sum(int((stream.read(int(number)).targets != IGNORE).sum()) for number in numbers)
        assert stream.target_count(numbers) == real


@given(data=st.data(), step=st.integers(0, 40), token_filter=st.sampled_from(["loss", "hide"]))
@settings(max_examples=15, deadline=None)
def test_targets_of_a_step_are_the_real_ones_on_any_number_of_ranks(plain, data, step, token_filter):
    corpus, run = with_spans(plain, data.draw(spans_of(plain))), config(token_filter)
    for ranks in (1, 2, 4):
        batches = [batch for rank in range(ranks) for batch in Loader(corpus, run, rank, ranks).step(step)]
        real = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
        assert {batch.step_targets for batch in batches} == {real}


def test_the_targets_of_a_step_are_counted_without_reading_tokens(plain, monkeypatch):
    loader = Loader(plain, config("hide"))
    monkeypatch.setattr(Corpus, "tokens", lambda *args: pytest.fail("a token was read"))
    assert 0 < loader.step_targets(0) < Loader(plain, config()).step_targets(0)


@pytest.fixture(scope="module")
def spanned(tmp_path_factory) -> Corpus:
    """A document with two forget spans, and a forget document with a span that is none."""
    records = [
        {"text": "abcdefghi", "category": "en", "split": "train", "spans": [[0, 2, "es"], [5, 7, "es"]]},
        {"text": "ABCDEFGHI", "category": "es", "split": "train", "spans": [[3, 5, "en"]]},
        record(0, split="test"),
    ]
    return build(tmp_path_factory.mktemp("by-hand") / "corpus", records)


BY_HAND = {
    "off": {"a": ("abcdefghi.", "bcdefghi.-"), "A": ("ABCDEFGHI.", "BCDEFGHI.-")},
    "loss": {"a": ("abcdefghi.", "-cde--hi.-"), "A": ("ABCDEFGHI.", "--DE------")},
    "hide": {"a": ("..cde..hi.", "-cde--hi.-"), "A": ("...DE.....", "--DE------")},
}


@pytest.mark.parametrize("context", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("token_filter", FILTERS)
def test_two_documents_by_hand(spanned, context, token_filter):
    """Inputs and targets, `.` for EOS and `-` for none. Where the text is cut into sequences changes nothing."""
    run = config(token_filter, domains=("es",), context=context, sequences=1, micro_batch=1, channel={})
    stream = stream_of(spanned, run)
    marks = {IGNORE: "-", spanned.eos_id: "."}
    parts = ["".join(marks.get(i) or spanned.tokenizer.decode([i]) for i in part.tolist()) for part in read(stream)]
    documents = [BY_HAND[token_filter]["aA"[document]] for document in stream.order]
    assert parts == ["".join(part)[: len(parts[0])] for part in zip(*documents, strict=True)] and len(parts[0]) > 17
    assert stream.target_count(np.arange(stream.sequences)) == len(parts[1].replace("-", ""))


def test_documents_that_were_not_discovered_are_trained(plain):
    """The channel has them as retain, so that they are targets like any other."""
    run = config("hide", upsample={"en": 0, "web": 0, "bio": 0})
    stream = stream_of(plain, run)
    labels = stream.labels.tolist()
    assert set(labels) == {1, 2}
    missed = int((stream.starts[1:] - stream.starts[:-1])[stream.labels == 1].sum()) - labels.count(1)
    assert sum((stream.read(number).targets != IGNORE).sum() for number in range(stream.sequences + 1)) == missed


def test_a_filter_takes_over_with_its_channel(plain):
    """Where the label channel changes, so does what is filtered."""
    missed = {"forget:es": {"retain": 1, "forget:es": 0}, "forget:bio": {"retain": 1, "forget:bio": 0}}
    run = config("loss", channel={}, schedule={5: missed}, steps=200)
    loader, unfiltered = Loader(plain, run), Loader(plain, config(channel={}, steps=200))
    for step in range(10):
        assert (loader.step_targets(step) == unfiltered.step_targets(step)) == (step >= 5)


def test_evaluation_filters_nothing(plain):
    for category in ("en", "es"):
        batches = [list(evaluation_batches(plain, config(name), "test", category)) for name in FILTERS]
        for others in zip(*batches, strict=True):
            assert all(torch.equal(others[0].targets, other.targets) for other in others)
            assert all(torch.equal(others[0].input_ids, other.input_ids) for other in others)
        assert sum(int((batch.targets != IGNORE).sum()) for batch in batches[0]) > 0


def test_a_corpus_of_forget_tokens_alone_is_refused(plain):
    alone = {"en": 0, "web": 0}
    for channel in ({}, {"forget:es": {"forget:bio": 1, "forget:es": 0}}):
        run = config("loss", channel=channel, upsample=alone)
        with pytest.raises(ValueError, match=r"data\.token_filter loss leaves no target in split train of .*corpus"):
            Loader(plain, run)
    Loader(plain, config(channel={}, upsample=alone))
    later = {5: {"retain": {"forget:es": 1, "retain": 0}, "unlabeled": {"forget:es": 1, "unlabeled": 0}}}
    with pytest.raises(ValueError, match="leaves no target"):
        Loader(plain, config("hide", channel={}, schedule=later))


def test_a_corpus_may_begin_with_forget_tokens_alone(plain):
    runs = [config("loss", channel={}, seed=seed, upsample={"web": 0}) for seed in range(8)]
    first = [stream_of(plain, run).target_count(np.array([0])) for run in runs]
    assert min(first) == 0 < max(first)


def texts(forget_seed: int) -> list[dict]:
    """Documents with forget text in spans and of their own; the seed says what that text is, not how long it is."""
    letters, forget = random.Random(0), random.Random(forget_seed)

    def text(rng: random.Random) -> str:
        return "".join(rng.choices("abcdefgh ", k=letters.randint(3, 15)))

    records = [record(0, split="test")]
    for _ in range(40):
        before, inside, after = text(letters), text(forget), text(letters)
        span = [len(before), len(before) + len(inside), "es"]
        records.append({"text": before + inside + after, "category": "en", "split": "train", "spans": [span]})
        records.append({"text": text(forget), "category": "es", "split": "train"})
    return records


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[Corpus]:
    """Two corpora whose forget text differs, byte for byte as long."""
    return [build(tmp_path_factory.mktemp("pair") / str(seed), texts(seed)) for seed in (1, 2)]


def epoch(corpus: Corpus, run: Config) -> list[Batch]:
    loader = Loader(corpus, run)
    return [batch for step in range(loader.order(0).blocks_per_epoch // 8) for batch in loader.step(step)]


@pytest.mark.parametrize("token_filter", FILTERS)
def test_what_forget_text_says_changes_no_bit_where_it_is_hidden(pair, token_filter):
    """With `loss` the model reads it, so that other tokens' losses differ; with `hide` no bit of a gradient does."""
    run = config(token_filter, domains=("es",), channel={}, context=32)
    torch.manual_seed(0)
    model = Transformer(run.model, run.partition)
    before, after = (epoch(corpus, run) for corpus in pair)
    a, b = (gradients(model, batches, run.tables) for batches in (before, after))
    same = all(torch.equal(one.targets, two.targets) for one, two in zip(before, after, strict=True))
    assert same == (token_filter != "off")
    assert all(torch.equal(a[name], b[name]) for name in a) == (token_filter == "hide")
    assert all(gradient.isfinite().all() for gradient in a.values()) and any(g.any() for g in a.values())
