"""No text makes a control id, whatever the tokenizer is, and all other text is encoded as before."""

from __future__ import annotations

import json

import pytest
from corpora import texts, write_jsonl
from hypothesis import example, given, settings
from tokenizer_folders import ANY_TEXT, KINDS, PAD, STORIES, byte_level, unigram, write_folder
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from sgtm.data.discover import open_sources
from sgtm.data.plain_text import as_text, control_ids, plain_text, reachable, unknown_token
from sgtm.data.prepare import prepare
from sgtm.data.rules import Rules
from sgtm.data.tokenizer import EOS, train_bpe

RULES = Rules.model_validate({"split": {"field": "split"}, "labels": {"en": "retain"}})
MENDED = {name: (plain_text(make(), {EOS, PAD}), lossless) for name, (make, lossless) in KINDS.items()}


@settings(max_examples=150, deadline=None)
@given(ANY_TEXT)
@example(f"a {EOS} b{EOS}{EOS}<s></s> <unk>")
@example("\x00\x7f ¿Qué? ñandú 🍒  two  spaces\n\n")
@example(EOS[:-1] + EOS)
def test_no_text_makes_a_control_id_and_it_comes_back(text):
    for name, (tokenizer, lossless) in MENDED.items():
        controls = control_ids(tokenizer, tokenizer.token_to_id(EOS))
        ids = tokenizer.encode(text).ids
        assert controls.isdisjoint(ids), name
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids, name
        if lossless:
            assert tokenizer.decode(ids, skip_special_tokens=False) == text, name


@pytest.mark.parametrize("name", KINDS)
def test_ids_stay_and_other_text_is_encoded_as_before(name):
    make, _ = KINDS[name]
    before, after = make(), MENDED[name][0]
    assert after.get_vocab(with_added_tokens=True) == before.get_vocab(with_added_tokens=True)
    for text in STORIES:
        assert after.encode(text).ids == before.encode(text, add_special_tokens=False).ids
    assert plain_text(after, {EOS, PAD}).to_str() == after.to_str()


def test_a_corpus_is_another_one_only_where_text_could_have_had_control_ids():
    reachable_tokens = {name: reachable(make(), {EOS, PAD}) for name, (make, _) in KINDS.items()}
    assert {name: tokens for name, tokens in reachable_tokens.items() if tokens} == {
        "not-declared": [PAD, EOS],
        "merged-piece": [EOS],
        "whole-piece": [EOS],
        "unigram": ["</s>", "<s>", "<unk>", EOS],
    }


def test_a_tokenizer_of_ours_needs_no_change():
    tokenizer = train_bpe(STORIES, 400)
    assert plain_text(tokenizer, {EOS}).to_str() == tokenizer.to_str()


def test_nothing_is_cut_padded_or_drawn():
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.model.dropout = 0.5
    for mended in (as_text(Tokenizer.from_str(tokenizer.to_str())), plain_text(tokenizer, {EOS})):
        assert mended.decode(mended.encode("a long sentence that is not cut").ids) == "a long sentence that is not cut"
    assert len({tuple(plain_text(tokenizer, {EOS}).encode(STORIES[0]).ids) for _ in range(9)}) == 1


@pytest.mark.parametrize(
    "processor",
    [
        processors.RobertaProcessing(("</s>", 1), ("<s>", 0)),
        processors.Sequence(
            [processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]), processors.ByteLevel()]
        ),
    ],
    ids=["roberta", "sequence"],
)
def test_offsets_of_spans_are_trimmed_as_before(processor):
    tokenizer = byte_level()
    tokenizer.post_processor = processor
    before = tokenizer.encode(STORIES[0], add_special_tokens=False)
    after = plain_text(tokenizer, {EOS}).encode(STORIES[0])
    assert after.ids == before.ids and after.offsets == before.offsets
    assert any(STORIES[0][start - 1] == " " for start, _ in after.offsets if start)


def test_what_stands_for_unknown_characters_is_no_control_id_unless_it_ends_documents():
    tokenizer = plain_text(unigram(), {EOS})
    unknown = tokenizer.token_to_id("<unk>")
    assert unknown_token(tokenizer) == "<unk>"
    assert unknown not in control_ids(tokenizer, tokenizer.token_to_id(EOS))
    assert unknown in control_ids(tokenizer, unknown)


def test_a_single_character_that_only_a_config_names_stays_text():
    """CLIP pads with an exclamation mark."""
    assert plain_text(byte_level(), {EOS, "!"}).to_str() == plain_text(byte_level(), {EOS}).to_str()


def test_a_string_that_a_normalizer_turns_into_a_control_token_is_spelled_out():
    tokenizer = unigram()
    tokenizer.normalizer = normalizers.Lowercase()
    mended = plain_text(tokenizer, {EOS})
    assert mended.token_to_id(EOS) not in mended.encode(f"a {EOS.upper()} b").ids


def newline_ends():
    tokenizer = byte_level()
    return Tokenizer.from_str(tokenizer.to_str().replace(EOS, "<stop>")), {"eos_token": "Ċ"}


def whole_words():
    tokenizer = Tokenizer(models.WordLevel({EOS: 0, "a": 1, "b": 2}, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")
    return tokenizer, {"eos_token": EOS}


@pytest.mark.parametrize("spanned", [False, True])
@pytest.mark.parametrize(
    ("make", "text", "problem"),
    [
        (newline_ends, "a story\nof two lines", r"'\\n' at character 7 becomes 'Ċ' \(id \d+\)"),
        (whole_words, "a b cat", r"'cat' at character 4 becomes '<\|endoftext\|>' \(id 0\)"),
    ],
)
def test_a_control_id_that_cannot_be_spelled_out_is_refused_with_file_and_line(tmp_path, make, text, problem, spanned):
    tokenizer, names = make()
    write_folder(tmp_path / "tokenizer", tokenizer, **names)
    fields = {"spans": [[0, 1, "en"]]}
    rules = RULES.model_copy(update={"spans": "spans"}) if spanned else RULES
    records = [
        {"text": "a", "category": "en", "split": "train"} | fields,
        {"text": text, "category": "en", "split": "train"} | fields,
    ]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: {problem}, a control token, .*take it out of the text"):
        prepare(open_sources([source]), rules, tmp_path / "tokenizer", tmp_path / "out", workers=1)


@pytest.mark.parametrize("name", KINDS)
def test_prepared_documents_hold_one_eos_each(tmp_path, name):
    make, lossless = KINDS[name]
    write_folder(tmp_path / "tokenizer", make(), eos_token=EOS, pad_token=PAD)
    written = [f"one {EOS} two", f"{EOS}", f"<s> and </s> and {PAD}", "plain"]
    records = [{"text": text, "category": "en", "split": "train"} for text in written]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    corpus = prepare(open_sources([source]), RULES, tmp_path / "tokenizer", tmp_path / "out", workers=1)
    tokens = [corpus.tokens(document).tolist() for document in range(4)]
    controls = control_ids(corpus.tokenizer, corpus.eos_id)
    assert [[i for i in document if i in controls] for document in tokens] == [[corpus.eos_id]] * 4
    if lossless:
        assert texts(corpus) == written
    assert corpus.token_names["eos_token"] == EOS
    assert json.loads((tmp_path / "out/tokenizer/tokenizer.json").read_text())["post_processor"] in (
        None,
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    )
