"""English documents with Spanish passages inside: the spans are the Spanish, and without them the English is whole."""

from __future__ import annotations

import pytest


@pytest.fixture
def span_corpus(benchmarks):
    import span_corpus

    return span_corpus


def test_spans_are_the_spanish_and_the_rest_is_the_english(span_corpus):
    english = [f"The house number {n} is green.\nWe walk there." for n in range(6)]
    spanish = ["Érase una vez una casa. " * 100, "Nosotros caminamos hacia el lago. " * 100]
    written = list(span_corpus.documents(english, spanish))
    assert [document["category"] for document in written] == ["mixed", "en"] * 3
    for number, document in enumerate(written):
        text = document["text"]
        if number % 2:
            assert (text, document["spans"]) == (english[number], [])
            continue
        ((start, end, category),) = document["spans"]
        passage = text[start:end]
        assert category == "es" and text[:start] + text[end:] == english[number]
        assert start == 0 or text[start - 1].isspace()
        assert spanish[number // 2 % 2].startswith(passage.strip()) and passage.endswith(" ")
        assert 380 <= len(passage) <= 1601
    assert written == list(span_corpus.documents(english, spanish))
