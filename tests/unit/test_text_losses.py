"""The loss of every token of a text: that of an evaluation, cut in the same way; and the texts of a file."""

from __future__ import annotations

import gzip
import math

import pytest
import torch
from corpora import build, config_for, record
from random_models import moved_model
from text_models import Bigrams, successors

from sgtm.evaluation.subject import Subject
from sgtm.inference.text_losses import passage, read_texts, token_losses
from sgtm.inference.text_model import RunModel


@pytest.fixture
def full(tmp_path) -> Subject:
    documents = [
        record(n, name, 40, split) for n, split in enumerate(("train", "test")) for name in ("en", "es", "web")
    ]
    config = config_for(context=16)
    return Subject(moved_model(config, 0.1), build(tmp_path / "corpus", documents), config)


@pytest.mark.parametrize("removed", [(), ("es",)])
def test_losses_are_those_of_an_evaluation(full, removed):
    """Of a document of 40 tokens and its end, in sequences of 16: those of the first two, and eight of the third."""
    model = RunModel(full).without(removed)
    document = full.corpus.select("test", "es")[0]
    ids = full.corpus.tokens(document)[:-1].tolist()
    assert model.encode("es000001".ljust(40, ".")) == ids
    losses = token_losses(model, ids)
    torch.testing.assert_close(losses, full.without(*removed).scores("test", "es").losses[:39], rtol=1e-5, atol=1e-5)
    assert len(losses) == 39


def test_pieces_have_the_size_of_the_context():
    reads = []

    class Noted(Bigrams):
        def logits(self, ids, last=False):
            reads.append(list(ids))
            return super().logits(ids, last)

    model = Noted(successors({}), context=4)
    losses = token_losses(model, list(range(1, 10)))
    assert reads == [[1, 2, 3, 4], [5, 6, 7, 8]] and len(losses) == 8
    reads.clear()
    assert torch.equal(token_losses(model, list(range(1, 10)), context=3), losses)
    assert reads == [[1, 2, 3], [4, 5, 6], [7, 8]]
    assert len(token_losses(model, [1])) == len(token_losses(model, [])) == 0


def test_a_loss_is_the_negative_log_probability():
    model = Bigrams(successors({"a": "b"}))
    likely, unlikely = token_losses(model, model.encode("abz")).tolist()
    assert likely == pytest.approx(math.log(1 + 256 * math.exp(-10)), rel=1e-4)
    assert unlikely == pytest.approx(10 + math.log(1 + 256 * math.exp(-10)), rel=1e-4)


def test_a_passage_has_the_losses_at_the_tokens_that_they_are_of():
    model = Bigrams(successors({}))
    ids = model.encode("añb")
    of_text = passage(model, "a.txt", ids, {"one": torch.tensor([1.23456, math.inf, math.nan])})
    assert of_text["tokens"] == ["a", "", "ñ", "b"] and of_text["category"] == "a.txt"
    assert of_text["losses"] == {"one": [None, 1.2346, None, None]}


def test_texts_are_those_of_any_file_that_prepare_reads(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three", "n": 1}\n{"text": ""}\n')
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "four"}\n')
    assert list(read_texts(tmp_path / "a.txt")) == [(f"{tmp_path}/a.txt", "one\ntwo\n")]
    expected = [(f"{tmp_path}/b.jsonl:1", "three"), (f"{tmp_path}/b.jsonl:2", ""), (f"{tmp_path}/c.jsonl.gz:1", "four")]
    assert [*read_texts(tmp_path / "b.jsonl"), *read_texts(tmp_path / "c.jsonl.gz")] == expected
    assert len(list(read_texts(tmp_path))) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"txt": "a"}', r"b\.jsonl:1: no field 'text' \(did you mean txt\?\)"),
        ('{"text": 3}', r"b\.jsonl:1: field 'text' holds int, expected text"),
        ('{"text": "\\ud800"}', r"b\.jsonl:1: the text has half a surrogate pair"),
        ("[1", r"b\.jsonl"),
    ],
)
def test_a_record_without_text_is_named_by_its_line(tmp_path, line, message):
    (tmp_path / "b.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        list(read_texts(tmp_path / "b.jsonl"))
