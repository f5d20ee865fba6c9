"""What a run trains on, by true and applied label, against its batches counted token by token."""

from __future__ import annotations

from collections import Counter

import pytest
from corpora import build, config_for, mixed_records, record, spanned_corpus

from sgtm.data.loader import Loader
from sgtm.data.trained import trained_tokens

HALVES = {"retain": {"retain": 0.5, "unlabeled": 0.5}}


def applied_tokens(corpus, config) -> Counter:
    loader, tokens = Loader(corpus, config), Counter()
    for step in range(config.train.steps):
        for batch in loader.step(step):
            for label, length in zip(batch.labels, batch.lengths, strict=True):
                tokens[config.space.labels[label]] += int(length)
    return tokens


def by_applied(tokens: dict[str, dict[str, float]]) -> Counter:
    return sum((Counter(row) for row in tokens.values()), Counter())


@pytest.mark.parametrize("mixing", ["sequence", "token"])
def test_tokens_are_those_of_the_batches(tmp_path, mixing):
    corpus = build(tmp_path / "corpus", mixed_records(120))
    config = config_for(mixing=mixing, channel=HALVES, steps=200)
    tokens = trained_tokens(corpus, config)
    assert set(tokens["retain"]) == {"retain", "unlabeled"} and set(tokens["forget:es"]) == {"forget:es"}
    assert by_applied(tokens) == pytest.approx(dict(applied_tokens(corpus, config)), rel=0.03)
    assert sum(by_applied(tokens).values()) == pytest.approx(200 * config.train.tokens_per_step)


def test_tokens_count_and_not_documents(tmp_path):
    lengths = {"en": 60, "es": 15}
    documents = [
        record(n, name, length, "test" if n % 9 == 0 else "train")
        for n in range(90)
        for name, length in lengths.items()
    ]
    tokens = trained_tokens(build(tmp_path / "corpus", documents), config_for(steps=200))
    ratio = tokens["retain"]["retain"] / tokens["forget:es"]["forget:es"]
    assert ratio == pytest.approx(61 / 16, rel=1e-9)  # with the end of each document


def test_a_channel_counts_for_the_steps_it_is_in_use(tmp_path):
    corpus = build(tmp_path / "corpus", mixed_records(120))
    config = config_for(channel={"retain": {"retain": 1}}, schedule={150: {"retain": {"forget:es": 1}}}, steps=200)
    tokens = trained_tokens(corpus, config)
    assert tokens["retain"]["forget:es"] / tokens["retain"]["retain"] == pytest.approx(1 / 3)


def test_a_category_left_out_is_not_trained(tmp_path):
    corpus = build(tmp_path / "corpus", mixed_records(120))
    assert "forget:es" not in trained_tokens(corpus, config_for(upsample={"es": 0}))


@pytest.mark.parametrize("policy", ["position", "conservative"])
def test_tokens_of_spans_have_the_label_of_their_span(tmp_path, policy):
    corpus = spanned_corpus(tmp_path / "corpus")
    config = config_for(mixing="token", steps=200, masking={"span_policy": policy})
    tokens = trained_tokens(corpus, config)
    assert by_applied(tokens) == pytest.approx(dict(applied_tokens(corpus, config)), rel=0.03)
    outside = set(tokens) - {"forget:es"}
    assert all(("forget:es" in tokens[true]) == (policy == "conservative") for true in outside & {"retain"})


def test_filtered_tokens_are_not_trained(tmp_path):
    corpus = spanned_corpus(tmp_path / "corpus")
    masking = {"span_policy": "position", "strategy": "none"}
    of_all, of_rest = (
        trained_tokens(corpus, config_for(mixing="token", steps=200, masking=masking, token_filter=how))
        for how in ("off", "loss")
    )
    assert "forget:es" in of_all
    assert of_rest == {true: row for true, row in of_all.items() if true != "forget:es"}
