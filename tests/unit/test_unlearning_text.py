"""The sequences of an unlearning: all of the categories, once in an epoch, in an order of the seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from corpora import SPAN_LABELS, build, config_for, record, spanned, spanned_corpus
from texts import CONFIG, FORGOTTEN, token_losses
from tiny import tiny_model

from sgtm.data.batch import IGNORE
from sgtm.unlearning.text import Sequences, log_likelihood, mean_loss

LABELS = {"en": "retain", "de": "retain", "es": "forget:es", "fr": "forget:es"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    records = [
        record(n, category, 24 + n, split)
        for n in range(7)
        for category in ("en", "de", "es")
        for split in ("train", "test")
    ]
    return build(tmp_path_factory.mktemp("text") / "corpus", [*records, record(0, "fr", split="test")], LABELS)


def rows(sequences: Sequences, steps: range) -> list[tuple]:
    return [tuple(row) for step in steps for row in sequences.batch(step).input_ids.tolist()]


def test_an_epoch_reads_every_sequence_once(corpus):
    config = config_for(micro_batch=1)
    sequences = Sequences(corpus, config, ["en", "de"], seed=3)
    each = [Sequences(corpus, config, [category], seed=0) for category in ("en", "de")]
    assert len(sequences) == sum(map(len, each)) > 10
    alone = sorted(row for part in each for row in rows(part, range(len(part))))
    first, second = (rows(sequences, range(e * len(sequences), (e + 1) * len(sequences))) for e in (0, 1))
    assert sorted(first) == sorted(second) == alone and first != second


def test_the_order_is_that_of_the_seed(corpus):
    config = config_for(micro_batch=2)
    orders = [rows(Sequences(corpus, config, ["en", "de"], seed), range(9)) for seed in (0, 0, 1, 2)]
    assert orders[0] == orders[1] and len({tuple(order) for order in orders}) == 3
    sequences = Sequences(corpus, config, ["en", "de"], 0)
    assert rows(sequences, range(4, 6)) == orders[0][8:12], "a step does not depend on those before"


def test_only_training_text_of_the_categories_is_read(corpus):
    sequences = Sequences(corpus, config_for(context=32), ["es"], seed=0)
    batches = [sequences.batch(step) for step in range(len(sequences))]
    text = "".join(corpus.tokenizer.decode(row) for batch in batches for row in batch.input_ids.tolist())
    assert "es00000" in text and "en" not in text and "de" not in text
    assert {label for batch in batches for label in batch.labels} == {2}
    documents = corpus.select("train", "es")
    one_epoch = [sequences.batch(step) for step in range(-(-len(sequences) // 2))]
    targets = sum(int((batch.targets != IGNORE).sum()) for batch in one_epoch)
    assert targets >= sum(corpus.documents["length"][documents]) - 1 - 32


def test_targets_are_those_of_the_spans(tmp_path: Path):
    corpus = spanned_corpus(tmp_path / "corpus")
    sequences = Sequences(corpus, config_for(context=32), ["toxin"], seed=0)
    targets = torch.cat([sequences.batch(step).targets.flatten() for step in range(len(sequences))])
    assert SPAN_LABELS["toxin"] == "forget:es" and "X" in spanned(1, "train")["text"]
    assert corpus.tokenizer.decode(targets[targets != IGNORE].tolist()).strip("X") == ""


def test_a_category_without_training_text_is_named(corpus):
    with pytest.raises(ValueError, match=r"corpus has no text of category fr in its split train: nothing to read"):
        Sequences(corpus, config_for(), ["es", "fr"], seed=0)


def test_likelihoods_and_mean_loss_by_hand():
    model = tiny_model(CONFIG)
    losses = token_losses(model, FORGOTTEN)
    expected = torch.stack([-losses[0].sum(), -losses[1].sum(), torch.tensor(0.0)])
    torch.testing.assert_close(log_likelihood(model, FORGOTTEN), expected)
    torch.testing.assert_close(mean_loss(model, FORGOTTEN), torch.cat(losses).mean())
    nothing = FORGOTTEN._replace(targets=torch.full_like(FORGOTTEN.targets, IGNORE))
    assert mean_loss(model, nothing).item() == 0.0
