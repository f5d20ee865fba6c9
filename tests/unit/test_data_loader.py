"""The order of data: pure in (seed, step), the same for any number of ranks, even in labels."""

import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from corpora import build, config_for, mixed_records, record
from hypothesis import given, settings
from hypothesis import strategies as st

from sgtm.data import loader as module
from sgtm.data.batch import IGNORE, Batch
from sgtm.data.loader import Loader, check_corpus, check_domains_trained, evaluation_batches, only_forget
from sgtm.data.store import Corpus
from sgtm.masking.labels import RETAIN, UNLABELED

MIXINGS = ("step", "micro", "sequence", "token")
FORGET = 2
CHANNEL = {"retain": {"retain": 0.5, "unlabeled": 0.5}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return build(tmp_path_factory.mktemp("loader") / "corpus", mixed_records(120))


def config(mixing: str, **options):
    return config_for(mixing=mixing, **{"channel": CHANNEL, "micro_blocks": 2, **options})


def rows(batches: list[Batch]) -> list[tuple]:
    """Every sequence with its targets, in order."""
    return [
        (*ids.tolist(), *targets.tolist())
        for batch in batches
        for ids, targets in zip(batch.input_ids, batch.targets, strict=True)
    ]


def token_labels(batch: Batch) -> np.ndarray:
    return np.repeat(batch.labels, batch.lengths).reshape(batch.input_ids.shape)


def global_step(corpus, run, step, world_size) -> list[Batch]:
    return [batch for rank in range(world_size) for batch in Loader(corpus, run, rank, world_size).step(step)]


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_step_is_a_function_of_its_number(corpus, mixing):
    loader = Loader(corpus, config(mixing))
    in_order = [rows(loader.step(step)) for step in range(12)]
    for step in (11, 3, 4, 0):
        assert rows(loader.step(step)) == in_order[step]  # after the prefetch of another step
        assert rows(Loader(corpus, config(mixing)).step(step)) == in_order[step]
    assert rows(Loader(corpus, config(mixing, seed=1)).step(0)) != in_order[0]


@pytest.mark.parametrize("mixing", MIXINGS)
@given(step=st.integers(0, 200), world_size=st.sampled_from([1, 2, 4]), micro_batch=st.sampled_from([1, 2]))
@settings(max_examples=15, deadline=None)
def test_a_step_holds_the_same_sequences_for_any_world_size_and_micro_batch(
    corpus, mixing, step, world_size, micro_batch
):
    whole = global_step(corpus, config(mixing, sequences=16), step, 1)
    parts = global_step(corpus, config(mixing, sequences=16, micro_batch=micro_batch), step, world_size)
    assert Counter(rows(whole)) == Counter(rows(parts))
    assert {batch.step_labels for batch in parts} == {whole[0].step_labels}
    assert {batch.step_targets for batch in parts} == {whole[0].step_targets}


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_targets_and_labels_of_a_step_are_the_real_ones(corpus, mixing, isolated):
    run = config(mixing, isolate_documents=isolated)
    loader = Loader(corpus, run, rank=1, world_size=2)
    for step in range(25):
        batches = global_step(corpus, run, step, 2)
        assert sum(int((batch.targets != IGNORE).sum()) for batch in batches) == loader.step_targets(step)
        assert {label for batch in batches for label in batch.labels} == loader.step_labels(step)
        assert batches[0].step_targets == loader.step_targets(step)
        assert batches[0].step_labels == loader.step_labels(step)


def test_other_ranks_tokens_are_not_read(corpus, monkeypatch):
    loader = Loader(corpus, config("token"))
    monkeypatch.setattr(Corpus, "tokens", lambda *args: pytest.fail("a token was read"))
    assert loader.step_targets(0) > 0 and loader.step_labels(0)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_the_documents_of_a_micro_batch_are_those_that_are_read_for_it(corpus, mixing, monkeypatch):
    inner, together, read, seen = Corpus.tokens, module.collate, {}, []
    this = threading.get_ident()  # loaders of other tests may still read ahead

    def tokens(corpus, document, start=0, end=None):
        if threading.get_ident() == this and (start, end) != (0, 1):  # that is a target across the end of a sequence
            read[document] = True
        return inner(corpus, document, start, end)

    def collate(*args):
        if threading.get_ident() == this:
            seen.append(list(read))
            read.clear()
        return together(*args)

    monkeypatch.setattr(Corpus, "tokens", tokens)
    monkeypatch.setattr(module, "collate", collate)
    for rank in range(2):
        Loader(corpus, config(mixing), rank, 2)._read(5)
    assert len(seen) == 4 and not read
    loader = Loader(corpus, config(mixing), 1, 2)
    assert [loader.documents(5, rank, index) for rank in range(2) for index in range(2)] == seen and not read


@pytest.mark.parametrize("mixing", ["step", "micro", "sequence"])
def test_sequences_are_label_pure(corpus, mixing):
    for step in range(20):
        for batch in global_step(corpus, config(mixing), step, 2):
            labels = token_labels(batch)
            assert (labels == labels[:, :1]).all() and batch.documents is None


def test_step_mixing_has_one_label_per_step(corpus):
    loader = Loader(corpus, config("step"))
    labels = [loader.step_labels(step) for step in range(40)]
    assert all(len(step_labels) == 1 for step_labels in labels) and len(set(labels)) == 3


def test_micro_mixing_has_one_label_per_accumulation_index(corpus):
    seen = set()
    for step in range(20):
        ranks = [Loader(corpus, config("micro"), rank, 2).step(step) for rank in range(2)]
        by_index = [{int(label) for batch in batches for label in batch.labels} for batches in zip(*ranks, strict=True)]
        assert all(len(labels) == 1 for labels in by_index)
        seen.add(tuple(min(labels) for labels in by_index))
    assert len(seen) > 3


@pytest.mark.parametrize("world_size", [1, 2])
def test_sequence_mixing_is_sorted_and_even(corpus, world_size):
    for step in range(20):
        batches = global_step(corpus, config("sequence", sequences=16, micro_batch=4), step, world_size)
        counts = [Counter(token_labels(batch)[:, 0].tolist()) for batch in batches]
        for label in (FORGET, UNLABELED, RETAIN):
            shares = [count[label] for count in counts]
            assert max(shares) - min(shares) <= 1
        for batch in batches:
            order = [(FORGET, UNLABELED, RETAIN).index(label) for label in batch.labels]
            assert order == sorted(order)


def test_of_several_domains_the_highest_comes_first(tmp_path):
    """What the collator's runs are sorted by: the last group's rows first."""
    labels = {"en": "retain", "es": "forget:es", "fr": "forget:fr", "web": "unlabeled"}
    documents = [record(n, category, 33, "train" if n else "test") for n in range(40) for category in labels]
    corpus = build(tmp_path / "corpus", documents, labels)
    run = config("sequence", sequences=16, micro_batch=16, domains=("es", "fr"))
    seen = set()
    for step in range(5):
        (batch,) = global_step(corpus, run, step, 1)
        seen |= set(batch.labels)
        order = [(FORGET + 1, FORGET, UNLABELED, RETAIN).index(label) for label in batch.labels]
        assert order == sorted(order)
    assert seen == {UNLABELED, RETAIN, FORGET, FORGET + 1}


@pytest.mark.parametrize(("mixing", "isolated"), [("token", False), ("sequence", True), ("step", True)])
def test_isolated_ranges_cover_the_micro_batch_and_stay_in_their_sequence(corpus, mixing, isolated):
    for batch in global_step(corpus, config(mixing, isolate_documents=isolated), 3, 1):
        size, context = batch.input_ids.shape
        edges = [0, *(end for _, end in batch.documents)]
        assert [start for start, _ in batch.documents] == edges[:-1] and edges[-1] == size * context
        assert all(start // context == (end - 1) // context for start, end in batch.documents)
        ends = batch.input_ids.flatten() == corpus.eos_id
        assert (batch.targets.flatten()[ends] == IGNORE).all()


def test_batches_are_as_documented(corpus):
    (batch, *_) = Loader(corpus, config("sequence")).step(0)
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
    assert batch.input_ids.shape == batch.targets.shape == (2, 16)
    assert sum(batch.lengths) == 32
    assert (batch.input_ids[:, 1:] == batch.targets[:, :-1]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domains": ["bio"]}, r"labelled forget:es, but masking\.domains is \['bio'\]"),
        ({"domains": ["es", "bio"]}, r"masking\.domains names 'bio', but no category .* labelled forget:bio"),
        ({"sequences": 2048}, "fewer than the 2048 of a step"),
        (
            {"sequences": 256, "mixing": "step"},
            r"step needs 256 in a block: add data, .* or lower train\.tokens_per_step$",
        ),
        ({"context": 4096}, r"label \S+ in split train has 0 sequences of 4096 tokens; .* or lower model\.context$"),
        ({"upsample": {"fr": 1.0}}, r"data\.upsample names fr"),
    ],
)
def test_a_config_that_does_not_fit_the_corpus_is_named(corpus, options, message):
    with pytest.raises(ValueError, match=message):
        Loader(corpus, config(**{"mixing": "sequence", **options}))


@pytest.mark.parametrize(("vocab", "fits"), [(256, False), (257, True), (384, True), (385, False)])
def test_the_vocabulary_may_be_padded_but_not_wrong(corpus, vocab, fits):
    run = config("sequence")
    run = run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": vocab})})
    if fits:
        Loader(corpus, run)
    else:
        with pytest.raises(ValueError, match=f"model.vocab_size is {vocab}, but the tokenizer of .* has 257 entries"):
            Loader(corpus, run)


def test_how_to_mend_the_vocabulary(corpus):
    """No choice is offered where the size is a multiple of 128 already."""
    run = config("sequence")
    with pytest.raises(ValueError, match=r"train with --model\.vocab_size 257 \(up to 384 is fine\), or .*-size 512$"):
        check_corpus(corpus, run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": 512})}))
    round_one = SimpleNamespace(vocab_size=256, manifest=corpus.manifest, path="data")
    with pytest.raises(ValueError, match=r"train with --model\.vocab_size 256, or prepare .*--vocab-size 257$"):
        check_corpus(round_one, run)


def test_a_category_that_the_corpus_lacks_is_refused_before_anything_is_read(corpus):
    run = config("sequence")
    with pytest.raises(ValueError, match=r"data\.upsample names fr; the categories of .* are "):
        check_corpus(corpus, run.model_copy(update={"data": run.data.model_copy(update={"upsample": {"fr": 0.0}})}))


def test_masks_without_text_of_their_domain_are_refused(corpus, tmp_path):
    """Not where the channel makes other text the domain's, or all of the domain's text something else."""
    without = build(tmp_path / "without", [record(n, split="test" if n < 2 else "train") for n in range(9)])
    check_domains_trained(corpus, config("sequence"))
    check_domains_trained(corpus, config("sequence", channel={"forget:es": {"unlabeled": 1}}))
    check_domains_trained(without, config("sequence", channel={"retain": {"retain": 0.9, "forget:es": 0.1}}))
    check_domains_trained(without, config("sequence", masking={"strategy": "none"}))
    with pytest.raises(
        ValueError, match=r"of es have nothing .*without: split train has no text of it; .*strategy none"
    ):
        check_domains_trained(without, config("sequence"))
    with pytest.raises(ValueError, match=r"of es have nothing .*: data\.upsample leaves out es; "):
        check_domains_trained(corpus, config("sequence", upsample={"es": 0.0}))


def test_nothing_but_forget_data_is_seen_after_the_label_channel(corpus):
    everything = {"retain": {"forget:es": 1}, "unlabeled": {"forget:es": 1}}
    assert not only_forget(corpus, config("sequence"))
    assert only_forget(corpus, config("sequence", channel=everything))
    assert not only_forget(corpus, config("sequence", channel={**everything, "unlabeled": {"forget:es": 0.9}}))
    assert not only_forget(corpus, config("sequence", channel=everything, masking={"strategy": "none"}))


def test_a_corpus_without_test_split_is_refused_before_training(tmp_path):
    corpus = build(tmp_path / "corpus", [record(0), record(1, "es")])
    with pytest.raises(ValueError, match="has no split 'test'"):
        Loader(corpus, config("sequence"))


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_token_once_with_equal_batches_on_all_ranks(corpus, isolated, limit, world_size):
    run = config("sequence", isolate_documents=isolated)
    ranks = [
        list(evaluation_batches(corpus, run, "test", "es", max_sequences=limit, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for batches in ranks for batch in batches]
    assert {batch.input_ids.shape for batch in batches} == {(2, 16)}
    assert {label for batch in batches for label in batch.labels} == {FORGET}
    targets = Counter(int(t) for batch in batches for t in batch.targets.flatten() if t != IGNORE)
    assert {batch.step_targets for batch in batches} == {targets.total()}
    documents = corpus.select("test", "es")
    tokens = Counter(int(t) for document in documents for t in corpus.tokens(int(document))[isolated:])
    if limit is None:
        missing = tokens - targets
        assert missing.total() == (0 if isolated else 1) and not targets - tokens
    else:
        assert 16 < targets.total() <= 48
    again = evaluation_batches(corpus, run, "test", "es", max_sequences=limit, world_size=world_size)
    assert rows(ranks[0]) == rows(list(again))


def test_a_short_evaluation_is_a_sample_of_the_whole_split(tmp_path):
    """Input is often sorted, by source or by date: its beginning stands for nothing."""
    documents = [record(n, length=15, split="test" if n else "train") for n in range(101)] + [record(0, "es")]
    corpus = build(tmp_path / "corpus", documents)
    batches = evaluation_batches(corpus, config("sequence"), "test", "en", max_sequences=20)
    text = corpus.tokenizer.decode([int(t) for batch in batches for t in batch.input_ids.flatten()])
    seen = [int(piece[:6]) for piece in text.split("en")[1:]]
    assert len(set(seen)) == 20 and 30 < sum(seen) / 20 < 70 and seen != sorted(seen)


def test_evaluation_reads_documents_with_spans_beside_others(tmp_path):
    documents = [
        record(0),
        record(1, split="test"),
        record(2, split="test", spans=[[3, 9, "es"]]),
        record(3, "web", split="test", spans=[[0, 4, "es"]]),
    ]
    corpus = build(tmp_path / "corpus", documents)

    def measured(category: str) -> Counter:
        batches = evaluation_batches(corpus, config("token"), "test", category)
        return Counter(int(t) for batch in batches for t in batch.targets.flatten() if t != IGNORE)

    one, two, three = (corpus.tokens(document).tolist() for document in (1, 2, 3))
    assert measured("en") == Counter([*one[1:], *two[1:3], *two[9:]])
    assert measured("es") == Counter([*two[3:9], *three[1:4]])
    assert measured("web") == Counter(three[4:])


def test_evaluation_of_a_category_without_documents_has_no_batches(tmp_path):
    corpus = build(tmp_path / "corpus", [record(0), record(1, "es"), record(2, split="test")])
    assert list(evaluation_batches(corpus, config("sequence"), "test", "es")) == []
    with pytest.raises(ValueError, match="no category 'fr'"):
        next(evaluation_batches(corpus, config("sequence"), "test", "fr"))


@pytest.mark.parametrize("mixing", ["sequence", "token"])
def test_a_channel_that_changes_takes_over_at_its_step(corpus, mixing):
    """Each step is that of a run with this channel alone, whichever steps were read before it."""
    later = {"retain": {"forget:es": 0.5}}
    steps = [0, 5, 6, 9, 2]
    changing = config(mixing, schedule={0.05: later}, steps=120)
    assert changing.channels[1][0] == 6
    loader = Loader(corpus, changing)
    alone = {False: Loader(corpus, config(mixing)), True: Loader(corpus, config(mixing, channel=later))}
    for step in steps:
        assert rows(loader.step(step)) == rows(alone[step >= 6].step(step)), step
        assert loader.step_labels(step) == alone[step >= 6].step_labels(step)
    labels = [[batch.labels for batch in each.step(6)] for each in (loader, alone[False])]
    assert labels[0] != labels[1]


def test_both_ways_adds_the_tokens_of_the_second_pass(corpus):
    """Half of the retain documents are trained as `forget:es` as well: every count of tokens has them twice."""
    channel = {"retain": {"retain": 1, "forget:es": 0.5}}
    plain = Loader(corpus, config("sequence", channel={})).order(0).streams
    both = Loader(corpus, config("sequence", channel=channel, both_ways=True)).order(0).streams
    assert both[RETAIN].tokens == plain[RETAIN].tokens
    forget, retain = set(plain[FORGET].order), set(plain[RETAIN].order)
    twice = set(both[FORGET].order) - forget
    assert twice < retain and 0.3 < len(twice) / len(retain) < 0.7
    extra = int(corpus.documents["length"][sorted(twice)].sum())
    assert both[FORGET].tokens == plain[FORGET].tokens + extra


def test_open_sequences_come_after_those_of_forget(corpus):
    loader = Loader(corpus, config("sequence", channel={"retain": {"retain": 0.4, "unlabeled": 0.3, "open:es": 0.3}}))
    batch_labels = [batch.labels for step in range(20) for batch in loader.step(step)]
    order = {FORGET: 0, 3: 1, UNLABELED: 2, RETAIN: 3}
    assert all(list(labels) == sorted(labels, key=order.get) for labels in batch_labels)
    assert {label for labels in batch_labels for label in labels} == set(order)


def test_a_model_that_starts_from_a_folder_may_have_any_number_of_rows_beyond_the_vocabulary(tmp_path):
    """Its rows are the folder's, which some pad further than to the next multiple of 128."""
    corpus = build(tmp_path / "c", mixed_records(30))
    run = config_for()

    def starting_from(folder, vocab):
        model, train = run.model.model_copy(update={"vocab_size": vocab}), {"init_from": folder}
        return run.model_copy(update={"model": model, "train": run.train.model_copy(update=train)})

    for vocab in (257, 384, 385, 512, 50_304):
        check_corpus(corpus, starting_from("folder", vocab))
    with pytest.raises(
        ValueError, match=r"vocab_size is 256, but .* 257 entries; .*its tokenizer: --tokenizer folder$"
    ):
        check_corpus(corpus, starting_from("folder", 256))
    with pytest.raises(ValueError, match="up to 384 is fine"):
        check_corpus(corpus, starting_from(None, 385))
