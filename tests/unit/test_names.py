"""A message about an unknown name shows how it differs from one that looks the same."""

import unicodedata

import pytest
from corpora import build, record
from families import partition_of

from sgtm.config.schema import ModelConfig
from sgtm.data.rules import Rules
from sgtm.hf.weights import to_hf_state
from sgtm.masking.labels import LabelSpace
from sgtm.process.names import did_you_mean, look_alike

NAME = "naïveté"
ONE, TWO = (unicodedata.normalize(form, NAME) for form in ("NFC", "NFD"))
SHOWN = r"'nai\\u0308vete\\u0301' and the known 'na\\xefvet\\xe9' look the same"


@pytest.mark.parametrize(
    ("name", "twin"),
    [(ONE, TWO), (TWO, ONE), ("a b", "a\xa0b"), ("ab", "a\u200bb"), ("ab", "\ufeffab"), ("ｂｉｏ", "bio")],
)
def test_names_that_look_the_same_are_shown_in_ascii(name, twin):
    note = look_alike(name, ["web", twin])
    assert note.isascii() and f"({name!a} and the known {twin!a} look the same" in note


@pytest.mark.parametrize("name", ["web", "naivete", ONE])
def test_other_names_and_the_name_itself_get_no_note(name):
    assert look_alike(name, ["biology", ONE]) == ""


def test_a_slip_is_found_in_any_case_and_shown_as_the_known_name():
    assert "QuickStart" in did_you_mean("QUICKSTRAT", ["debug", "QuickStart"])
    assert did_you_mean("xyzzy", ["debug", "QuickStart"]) == ""


def test_messages_about_domains_labels_categories_and_splits_have_it(tmp_path):
    space = LabelSpace((ONE,))
    with pytest.raises(ValueError, match=rf"unknown domain .* \({SHOWN}"):
        space.group_of(TWO)
    with pytest.raises(ValueError, match=r"unknown label .*forget:nai\\u0308.* look the same"):
        space.label(f"forget:{TWO}")
    records = [record(0, "web", split=ONE), record(1, ONE)]
    corpus = build(tmp_path / "c", records, {"web": "retain", ONE: f"forget:{TWO}"})
    with pytest.raises(ValueError, match=rf"no split .* \({SHOWN}"):
        corpus.select(TWO)
    with pytest.raises(ValueError, match=rf"no category .* \({SHOWN}"):
        corpus.select(ONE, TWO)
    with pytest.raises(ValueError, match=r"documents labelled .*forget:nai\\u0308.* look the same"):
        corpus.label_of_category(space)


def test_the_message_of_an_export_has_it():
    config = ModelConfig(layers=1, hidden_size=8, heads=2, intermediate_size=8, vocab_size=9, context=8)
    partition = partition_of(LabelSpace((ONE,)), config, forget_heads=1, forget_neurons=1)
    with pytest.raises(ValueError, match=rf"cannot remove .* \({SHOWN}.*; domains: {ONE}"):
        to_hf_state({}, config, partition, [TWO])


def test_the_message_about_an_unknown_category_of_a_record_has_it():
    rules = Rules.model_validate({"labels": {ONE: "retain"}, "split": {"hash": {"test": 0.5}}})
    with pytest.raises(ValueError, match=rf"\({SHOWN}"):
        rules.document({"text": "a", "category": TWO}, "a.jsonl", "a.jsonl: line 1")
