"""The label a token is trained under is that of its own document, through packing, loader and channel.

The texts of these corpora begin with their category and number, and a token is a byte, so a batch says itself what it
is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
from corpora import BYTES, build, config_for, mixed_records, record

from sgtm.config.schema import Config
from sgtm.data.batch import Batch
from sgtm.data.loader import Loader
from sgtm.data.store import Corpus
from sgtm.masking.labels import RETAIN, UNLABELED

MIXINGS = ("step", "micro", "sequence", "token")
FORGET = 2
CHANNEL = {"retain": {"retain": 0.5, "unlabeled": 0.5}}
ALLOWED = {"en": {RETAIN, UNLABELED}, "es": {FORGET}, "web": {UNLABELED}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build(tmp_path_factory.mktemp("labels") / "corpus", mixed_records(120))


def rows(corpus: Corpus, batch: Batch) -> Iterator[tuple[str, list[int]]]:
    """Text of every sequence, a line break for the end of a document, and the label of each of its characters."""
    characters = [corpus.tokenizer.decode([token]) for token in range(BYTES - 1)]
    labels = np.repeat(batch.labels, batch.lengths).reshape(batch.input_ids.shape).tolist()
    for ids, row in zip(batch.input_ids.tolist(), labels, strict=True):
        yield "".join("\n" if token == corpus.eos_id else characters[token] for token in ids), row


def labels_of_documents(corpus: Corpus, config: Config, steps: int) -> dict[str, set[int]]:
    """Applied labels of every document whose beginning is seen: {"en000012": {1}, ...}."""
    seen: dict[str, set[int]] = {}
    loader = Loader(corpus, config)
    for step in range(steps):
        for batch in loader.step(step):
            for text, labels in rows(corpus, batch):
                for start in re.finditer(r"\n((?:en|es|web)\d{6})", text):
                    inside = labels[start.start(1) : start.end(1)]
                    seen.setdefault(start.group(1), set()).update(inside)
    return seen


@pytest.mark.parametrize("mixing", MIXINGS)
def test_text_and_label_belong_together(corpus, mixing):
    seen = labels_of_documents(corpus, config_for(mixing=mixing, channel=CHANNEL, micro_blocks=2), 40)
    assert {name[:2] for name in seen} == {"en", "es", "we"}
    for name, labels in seen.items():
        assert len(labels) == 1, f"{name} is one document and has one label"
        assert labels <= ALLOWED[name.rstrip("0123456789")], name


def test_the_channel_splits_retain_documents_by_their_id(corpus):
    def english(**options):
        seen = labels_of_documents(corpus, config_for(mixing="sequence", channel=CHANNEL, **options), 60)
        return {name: labels for name, labels in seen.items() if name.startswith("en")}

    labels = english()
    share = sum(label == {RETAIN} for label in labels.values()) / len(labels)
    assert 0.3 < share < 0.7
    other = english(seed=1)
    common = labels.keys() & other.keys()
    assert any(labels[name] != other[name] for name in common)
    without_web = english(upsample={"web": 0})
    assert all(labels[name] == without_web[name] for name in labels.keys() & without_web.keys())


@pytest.mark.parametrize(("policy", "before"), [("conservative", FORGET), ("position", RETAIN)])
def test_the_span_policy_reaches_the_batches(tmp_path, policy, before):
    """Text before a forget span: trained as forget, or as its own label."""
    records = [record(n, "en", 30, spans=[[12, 20, "es"]]) for n in range(200)]
    corpus = build(tmp_path / "spans", [*records, *mixed_records(20)])
    run = config_for(context=64, mixing="token", masking={"span_policy": policy})
    labels_before = set()
    for batch in Loader(corpus, run).step(0):
        for text, labels in rows(corpus, batch):
            for start in re.finditer(r"\nen(?=\d{6}\.{22}\n)", text):
                labels_before.add(labels[start.start() + 1])
    assert labels_before == {before}
