"""What a field may hold: text, numbers and booleans as categories, several of them; all else is named by line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from corpora import BYTES, contents, record, write_jsonl
from pyarrow import parquet

from sgtm.data.discover import open_sources
from sgtm.data.prepare import _job, prepare
from sgtm.data.rules import Rules, load_rules
from sgtm.data.store import MANIFEST, Corpus
from sgtm.data.summary import warnings

LABELS = {"en": "retain", "es": "forget:es"}
BY = {"hash": {"test": 0.5}, "by": "book"}
CONSTANT = {"constant": "train"}


def rules_of(**keys) -> Rules:
    return Rules.model_validate({"split": CONSTANT, "labels": LABELS, **keys})


def prepared(tmp_path: Path, source: Path, rules: Rules) -> Corpus:
    return prepare(open_sources([source]), rules, "train", tmp_path / "out", vocab_size=BYTES, workers=1)


def document(rules: Rules, **fields):
    return rules.document({"text": "text", "category": "en", **fields}, "a.jsonl", "a.jsonl:7")


@pytest.mark.parametrize(
    ("value", "description"),
    [
        (None, "null"),
        ("", "''"),
        (" \t", r"' \\t'"),
        (float("nan"), "nan"),
        ([], "list"),
        (["a"], "list"),
        ({"a": 1}, "dict"),
    ],
)
def test_what_has_no_value_is_named(value, description):
    """In every field that names something."""
    by = rf"a\.jsonl:7: field 'book' (of split\.by )?holds {description}, "
    with pytest.raises(ValueError, match=by):
        document(rules_of(split=BY), book=value)
    for keys in ({"split": {"field": "book"}}, {"category": {"field": "book"}}, {"id": "book"}):
        with pytest.raises(ValueError, match=rf"a\.jsonl:7: field 'book' holds {description}, expected text"):
            document(rules_of(**keys), book=value)


def test_documents_without_a_group_are_drawn_by_their_text_where_the_rules_allow_it():
    rules, alone = rules_of(split={**BY, "by_missing": "document"}), rules_of(split={"hash": {"test": 0.5}})
    texts = [f"text {number}" for number in range(2000)]
    expected = [document(alone, text=text).split for text in texts]
    for missing in ({"book": None}, {"book": ""}, {"book": float("nan")}, {}):
        assert [document(rules, text=text, **missing).split for text in texts] == expected
    assert 0.45 < expected.count("test") / len(expected) < 0.55
    assert len({document(rules, text=text, book="b").split for text in texts}) == 1
    for value in ([], ["b"], {}):
        with pytest.raises(ValueError, match="field 'book' holds"):
            document(rules, book=value)
    with pytest.raises(ValueError, match="no field 'book'"):
        document(rules_of(split={**BY, "by_missing": "refuse"}))


def test_a_nested_field_that_is_missing_lists_those_beside_it():
    rules = rules_of(category={"field": "meta.topics"})
    with pytest.raises(
        ValueError, match=r"'meta\.topics' \(did you mean meta\.topic\?\); meta has meta\.topic, meta\.n$"
    ):
        document(rules, meta={"topic": "en", "n": 1})
    for meta in ({}, "en"):
        with pytest.raises(ValueError, match=r"no field 'meta\.topics'; the record has .*meta"):
            document(rules, meta=meta)


SURROGATE = r"half a surrogate pair \(\\ud800\) at character 1; write both halves, or remove it"


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"split": BY}, "field 'x'"),
        ({"split": {"field": "x"}}, "field 'x'"),
        ({"category": {"field": "x"}}, "field 'x'"),
        ({"category": {"any_of": "x"}}, "field 'x'"),
        ({"id": "x"}, "field 'x'"),
        ({"text": "x"}, "the text"),
    ],
)
def test_half_a_surrogate_pair_is_named_in_every_field(tmp_path, keys, what):
    if keys.get("split") == BY:
        keys = {"split": {**BY, "by": "x"}}
    source = write_jsonl(tmp_path / "a.jsonl", [{**record(0), "x": "en"}])
    with source.open("a") as handle:
        handle.write(json.dumps({**record(1), "x": "e\ud800"}) + "\n")
    labels = {**LABELS, "train": "retain"}
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: {what} has {SURROGATE}"):
        prepared(tmp_path, source, rules_of(labels=labels, **keys))


def test_a_second_half_that_no_name_has_is_half_a_pair():
    with pytest.raises(ValueError, match=r"7: the text has half a surrogate pair \(\\udc80\) at character 0; "):
        document(rules_of(), text="\udc80")


def test_half_a_surrogate_pair_in_the_rules_is_named(tmp_path):
    (tmp_path / "rules.yaml").write_text('labels: {en: retain}\ncategory: {constant: "\\uD800"}')
    with pytest.raises(ValueError, match=r"rules\.yaml: .*surrogate"):
        load_rules(tmp_path / "rules.yaml")


def test_a_name_that_is_not_utf8_is_read_and_named_where_it_matters(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    write_jsonl(folder / "en.jsonl", [record(0)])
    (tmp_path / "good").mkdir()
    assert len(prepared(tmp_path / "good", folder, rules_of()).documents) == 1
    message = rf"{tmp_path}/caf\\xe9/en\.jsonl:1: the match of (split|category)\.path .* has the byte 0xe9,"
    message += r" which is not UTF-8, at character 3; rename the file or folder$"
    for keys in ({"split": {"path": "([^/]+)/[^/]+$"}}, {"category": {"path": "([^/]+)/[^/]+$"}}):
        with pytest.raises(ValueError, match=message) as caught:
            prepared(tmp_path, folder, rules_of(**keys))
        str(caught.value).encode()
    (folder / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"caf\\xe9/a\.txt: field 'category' has the byte 0xe9, which is not UTF-8,"):
        prepared(tmp_path, folder, rules_of())


@pytest.mark.parametrize(
    ("labels", "values", "names"),
    [
        ("{0: retain, 1: forget:bio}", [0, 1, "1"], ["0", "1", "1"]),
        ("{false: retain, true: forget:bio}", [False, True, "true"], ["false", "true", "true"]),
        ('{"0": retain, "true": forget:bio}', [0, True], ["0", "true"]),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_numbers_and_booleans_are_categories(tmp_path, labels, values, names, suffix):
    (tmp_path / "rules.yaml").write_text(f"split: {{constant: train}}\nlabels: {labels}")
    source = tmp_path / f"a{suffix}"
    values, names = (values, names) if suffix == ".jsonl" else (values[:2], names[:2])
    if suffix == ".parquet" and len(set(map(type, values))) > 1:
        values, names = values[1:], names[1:]
    records = [{**record(number), "category": value} for number, value in enumerate(values)]
    if suffix == ".jsonl":
        write_jsonl(source, records)
    else:
        parquet.write_table(pa.Table.from_pylist(records), source)
    corpus = prepared(tmp_path, source, load_rules(tmp_path / "rules.yaml"))
    assert [list(corpus.categories)[number] for number in corpus.documents["category"]] == names


def test_of_several_categories_the_first_of_the_rules_counts(tmp_path):
    labels = {"ads": "drop", "bio": "forget:bio", "web": "retain"}
    rules = rules_of(labels=labels, category={"any_of": "topics"})
    for topics, expected in ((["web", "bio"], "bio"), (["bio", "web", "bio"], "bio"), (["web"], "web"), ("web", "web")):
        assert document(rules, topics=topics).category == expected
    assert document(rules, topics=["web", "ads"]) is None
    with pytest.raises(ValueError, match=r"7: unknown category 'boi' \(did you mean bio\?\)"):
        document(rules, topics=["web", "boi"])
    with pytest.raises(ValueError, match=r"7: field 'topics' holds an empty list"):
        document(rules, topics=[])
    with pytest.raises(ValueError, match=r"7: field 'topics' holds null, expected text"):
        document(rules, topics=["web", None])
    parquet.write_table(
        pa.Table.from_pylist([{"text": "a b c", "topics": ["web", "bio"], "n": 1}]), tmp_path / "a.parquet"
    )
    assert prepared(tmp_path, tmp_path / "a.parquet", rules).manifest.counts["train"].keys() == {"bio"}


def test_another_order_of_labels_is_another_corpus(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "topics": ["en", "es"]}])
    prepared(tmp_path, source, rules_of(category={"any_of": "topics"}))
    with pytest.raises(ValueError, match="prepared from other rules;"):
        prepared(tmp_path, source, rules_of(category={"any_of": "topics"}, labels=dict(reversed(LABELS.items()))))


def test_a_finished_corpus_of_rules_without_the_newer_keys_is_still_known():
    rules = _job([], rules_of(), "train", 300)["rules"]
    assert list(rules) == ["text", "category", "split", "labels", "spans"]
    assert list(rules["category"]) == ["field", "constant", "path"]
    assert list(rules["split"]) == ["field", "constant", "path", "hash", "by"]
    assert _job([], rules_of(id="id"), "train", 300)["rules"]["id"] == "id"


def test_repeats_and_nul_characters_are_reported(tmp_path, monkeypatch):
    from sgtm.data import readers

    monkeypatch.setattr(readers, "BLOCK_BYTES", 150)
    records = [record(number, "es" if number % 2 else "en", name=f"n{number}") for number in range(12)]
    records += [
        record(0, split="test", name="n5"),
        record(20, name="n7"),
        record(20, name="n7"),
        record(21, name="n21"),
    ]
    records += [{**record(1), "text": record(1, "es")["text"], "name": "x"}]
    records[3]["text"] += "\0"
    records[9]["text"] += "\0\0"
    rules = rules_of(split={"field": "split"}, id="name")
    corpus = prepared(tmp_path, write_jsonl(tmp_path / "a.jsonl", records), rules)
    notes = [line for line in warnings(corpus, rules) if "split test:" not in line]
    assert notes == [
        f"2 documents have NUL characters; the first is {tmp_path / 'a.jsonl'}:4",
        "2 values of name occur more than once, in 5 documents; the first is 'n5' (rules: id)",
        "3 of 17 documents repeat the text of another one",
        "1 document of split test has the text of one in split train, whose loss is learned",
        "1 text occurs under more than one true label: what one label holds back another teaches",
    ]
    assert Corpus.open(corpus.path).manifest.notes == notes[:2]


def test_a_corpus_without_notes_is_as_it_was(tmp_path):
    corpus = prepared(tmp_path, write_jsonl(tmp_path / "a.jsonl", [record(0), record(1)]), rules_of())
    assert "notes" not in json.loads((corpus.path / MANIFEST).read_text()) and contents(corpus.path)
