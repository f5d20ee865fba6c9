"""Long documents are encoded in pieces, and to the same tokens; a tokenizer whose words are others gets them whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpora import Records
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from sgtm.data import encode
from sgtm.data.encode import Encoder
from sgtm.data.plain_text import as_text
from sgtm.data.rules import Rules
from sgtm.data.synthetic import tell_stories
from sgtm.data.tokenizer import can_be_cut, cut, train_bpe

STORIES = tell_stories("en", "train", 0, 20) + tell_stories("es", "train", 0, 20)
RULES = Rules.model_validate(
    {"category": {"constant": "a"}, "split": {"constant": "train"}, "labels": {"a": "retain"}, "spans": "spans"}
)
TEXTS = st.one_of(
    st.text(st.sampled_from("ab1 _'\n\t\u00a0\x1c\x85ñ🍒.,"), max_size=60),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.sampled_from(STORIES),
)


@pytest.fixture(scope="module")
def tokenizer():
    return as_text(train_bpe([*STORIES, "a   b \n \n 1\t\t2 _ _ ' 's  \n a" * 500], 600))


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(1, 9))
@example("a   b \n \n 1", 2)
def test_pieces_have_the_tokens_of_the_whole(tokenizer, text, size):
    pieces = list(cut(text, size))
    assert "".join(pieces) == text
    tokens = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False).ids]
    assert tokens == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("size", [1, 30, 10**6])
def test_documents_of_a_block_in_any_batches(tokenizer, tmp_path, monkeypatch, size):
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", size)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = [*STORIES[:3], "x", "two words", "no-space" * 9]
    spans = [[[4, 9, "a"]] if number in (1, 4) else [] for number in range(len(texts))]
    records = tuple({"text": text, "spans": marked} for text, marked in zip(texts, spans, strict=True))
    block = Encoder(RULES, Path(tmp_path / "tokenizer.json"), 599, 600, 10**6).encode(Records(records))
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert block.tokens.tolist() == [token for ids in expected for token in [*ids, 599]]
    assert block.documents["length"].tolist() == [len(ids) + 1 for ids in expected]
    assert block.spans["document"].tolist() == [1, 4]


def test_what_may_be_cut(tokenizer):
    assert can_be_cut(tokenizer)
    for change in (
        lambda other: setattr(other, "normalizer", normalizers.NFC()),
        lambda other: setattr(other, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda other: setattr(other, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda other: setattr(other, "pre_tokenizer", pre_tokenizers.ByteLevel(False, use_regex=False)),
        lambda other: other.add_tokens(["two words"]),
    ):
        change(other := as_text(train_bpe(STORIES, 300)))
        assert not can_be_cut(other)
