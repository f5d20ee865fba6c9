"""Completions token by token: greedy or drawn, always the same for a seed, and ended for a reason."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from text_models import Bigrams, successors

from sgtm.data.tokenizer import EOS
from sgtm.inference.decoding import GREEDY, Completion, Interrupted, Sampling, complete, encode_prompt

CHAIN = successors({"a": "b", "b": "c", "c": "a"})
UNEVEN = torch.full((257, 257), -math.inf)
UNEVEN[:, 50:53] = torch.tensor([0.0, 1.0, 2.0])
"""Behind everything the tokens 50, 51 and 52, with logits 0, 1 and 2."""


def test_greedy_takes_the_most_likely_token():
    assert complete(Bigrams(CHAIN), "xa", 5) == Completion("bcabc", Bigrams(CHAIN).encode("bcabc"), "tokens")


def test_the_end_of_the_text_ends_it_and_is_left_out():
    model = Bigrams(successors({"a": "b", "b": EOS}))
    assert complete(model, "a", 9) == Completion("b", model.encode("b"), "end")
    assert complete(model, "b", 9) == Completion("", [], "end")


def test_a_full_context_ends_it():
    completion = complete(Bigrams(CHAIN, context=6), "aab", 9)
    assert (completion.text, completion.ended) == ("cab", "context")
    assert complete(Bigrams(CHAIN, context=6), "aab", 3).ended == "tokens"


def test_a_prompt_that_leaves_no_room_or_is_empty_is_refused():
    model = Bigrams(CHAIN, context=6)
    assert len(encode_prompt(model, "aabbc")) == 5
    with pytest.raises(
        ValueError, match=r"the prompt has 6 tokens, and the context of bigrams holds 6.*shorten it to 5"
    ):
        complete(model, "aabbcc", 1)
    with pytest.raises(ValueError, match="the prompt is empty"):
        complete(model, "", 1)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 2)])
def test_tokens_are_drawn_from_the_softmax_of_the_most_likely(temperature, top_k):
    drawn = Counter(complete(Bigrams(UNEVEN, context=4000), "a", 3000, Sampling(temperature, top_k)).ids)
    tokens = [50, 51, 52][-(top_k or 3) :]
    expected = (torch.tensor(tokens, dtype=torch.float64) / temperature).softmax(0).tolist()
    assert set(drawn) == set(tokens)
    for token, probability in zip(tokens, expected, strict=True):
        error = math.sqrt(probability * (1 - probability) / 3000)
        assert abs(drawn[token] / 3000 - probability) < 4 * error


def test_a_seed_gives_the_same_text_whatever_was_drawn_before():
    model, sampling = Bigrams(torch.randn(257, 257)), Sampling(1.0, 50, 3)
    first = complete(model, "a", 40, sampling)
    torch.rand(7)
    assert complete(Bigrams(model.table), "a", 40, sampling) == first
    assert complete(model, "a", 40, sampling._replace(seed=4)).ids != first.ids


def test_one_candidate_is_greedy_at_any_temperature():
    model = Bigrams(torch.randn(257, 257))
    assert complete(model, "a", 20, Sampling(5.0, 1)) == complete(model, "a", 20, GREEDY)


def test_ids_that_stand_for_no_token_are_never_taken():
    """A vocabulary may be padded."""
    padded = torch.cat([CHAIN, torch.full((257, 7), 99.0)], 1)
    assert complete(Bigrams(padded), "a", 3).text == "bca"
    assert complete(Bigrams(padded), "a", 3, Sampling(0.01)).text == "bca"


def test_a_character_of_several_tokens_is_whole_or_not_there():
    model = Bigrams(successors({"a": "Ã", "Ã": "±", "±": "b", "b": "b"}))  # bytes of ñ
    assert [complete(model, "a", tokens).text for tokens in (1, 2, 3)] == ["", "ñ", "ñb"]


def test_an_interrupted_one_ends_before_the_next_token():
    model = Bigrams(CHAIN)
    with pytest.raises(Interrupted):
        complete(model, "a", 9, interrupted=lambda: model.calls == 3)
    assert model.calls == 3


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(-1.0), "temperature -1: expected a number from 0"),
        (Sampling(math.inf), "temperature inf"),
        (Sampling(math.nan), "temperature nan"),
        (Sampling(1.0, 0), "top-k 0: expected a whole number above 0"),
        (Sampling(0.0, 5), "top-k 5 draws tokens, and temperature 0 draws none"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(sampling, message):
    with pytest.raises(ValueError, match=message):
        complete(Bigrams(CHAIN), "a", 1, sampling)
