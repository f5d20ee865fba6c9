"""Two models on the same documents: sums, means and errors, and which models have nothing to compare."""

from __future__ import annotations

import json
import math

import pytest
from text_models import Bigrams, successors
from tokenizers import Tokenizer

from sgtm.inference.comparison import compare_models
from sgtm.inference.text_losses import token_losses

FIRST, SECOND = Bigrams(successors({"a": "b"}), "first"), Bigrams(successors({"a": "c"}), "second")
TEXTS = [("1", "abab"), ("2", "acx"), ("3", "abcacacab"), ("empty", ""), ("short", "a")]


def test_sums_and_means_are_over_tokens_and_errors_over_documents():
    comparison = compare_models(FIRST, SECOND, TEXTS)
    by_document = [
        [token_losses(model, model.encode(text)).double().sum().item() for _, text in TEXTS[:3]]
        for model in (FIRST, SECOND)
    ]
    counts = [3, 2, 8]
    differences = [b - a for a, b in zip(*by_document, strict=True)]
    for total, sums in zip(comparison[1:4], (*by_document, differences), strict=True):
        mean = sum(sums) / 13
        squares = sum((s - n * mean) ** 2 for s, n in zip(sums, counts, strict=True))
        assert total.sum == pytest.approx(sum(sums)) and total.mean.value == pytest.approx(mean)
        assert total.mean.error == pytest.approx(math.sqrt(3 / 2 * squares) / 13, rel=1e-4)
    assert comparison.difference.mean.value == pytest.approx(comparison.second.mean.value - comparison.first.mean.value)
    assert (comparison.names, comparison.documents, comparison.tokens) == (("first", "second"), 3, 13)
    assert comparison.unpredicted == 2


def test_a_single_document_has_no_error_and_a_model_no_difference_from_a_twin():
    comparison = compare_models(FIRST, Bigrams(FIRST.table, "twin"), TEXTS[:1])
    assert comparison.difference == (0.0, (0.0, None)) and comparison.first.mean.error is None


def test_the_first_documents_are_passages():
    first, second = compare_models(FIRST, SECOND, TEXTS, shown=2).passages
    assert (first["category"], "".join(second["tokens"])) == ("1", "acx")
    assert list(first["losses"]) == ["first", "second"] and first["losses"]["first"][0] is None
    assert first["losses"]["second"][1] > first["losses"]["first"][1]
    assert compare_models(FIRST, SECOND, TEXTS, shown=0).passages == []


def test_both_read_pieces_of_the_smaller_context():
    seen = []

    class Noted(Bigrams):
        def logits(self, ids, last=False):
            seen.append((self.name, len(ids)))
            return super().logits(ids, last)

    compare_models(Noted(FIRST.table, "long", 64), Noted(FIRST.table, "short", 4), [("1", "abcdefg")])
    assert seen == [("long", 4), ("long", 2), ("short", 4), ("short", 2)]


def test_models_of_one_name_and_texts_without_a_loss_are_refused():
    with pytest.raises(ValueError, match="first is compared with itself: give two models, or --remove DOMAIN"):
        compare_models(FIRST, Bigrams(SECOND.table, "first"), TEXTS)
    with pytest.raises(ValueError, match="no document has two tokens, so that there is no loss"):
        compare_models(FIRST, SECOND, TEXTS[3:])


def changed(change) -> Bigrams:
    """The second model, with a change made to its tokenizer's JSON."""
    other = Bigrams(SECOND.table, "second")
    state = json.loads(other.tokenizer.to_str())
    change(state)
    other.tokenizer = Tokenizer.from_str(json.dumps(state))
    return other


def test_models_with_other_vocabularies_are_refused():
    def swap(state):
        vocab = state["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    def more(state):
        state["model"]["vocab"]["abc"] = 257

    low = min(FIRST.tokenizer.token_to_id(letter) for letter in "ab")
    with pytest.raises(ValueError, match=f"2 ids stand for other tokens, {low} for 'a' and 'b'; per-token"):
        compare_models(FIRST, changed(swap), TEXTS)
    with pytest.raises(ValueError, match="1 ids stand for other tokens, 257 for nothing and 'abc'"):
        compare_models(FIRST, changed(more), TEXTS)


def test_models_that_cut_a_text_into_other_tokens_are_refused():
    """The same vocabulary, and another normalizer."""
    other = changed(lambda state: state.update(normalizer={"type": "Lowercase"}))
    assert compare_models(FIRST, other, [("1", "ab")]).tokens == 1
    with pytest.raises(ValueError, match="2: the tokenizers of first and second cut it into other tokens"):
        compare_models(FIRST, other, [("1", "ab"), ("2", "Ab")])
