"""The rule file: every mistake is told by file and key, with what was found and what would be right."""

import re
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from sgtm.config.reference import keys
from sgtm.config.schema import DataConfig
from sgtm.data.discover import open_sources
from sgtm.data.rules import CategorySelector, Rules, SplitSelector, load_rules
from sgtm.masking.channel import LabelChannel
from sgtm.masking.labels import LabelSpace

ROOT = Path(__file__).parents[2]
TAKES = "but it takes: retain, unlabeled, forget:<domain> or drop"
EXAMPLE = "takes the true label of each category: {web: retain, virology: forget:bio}"
LABELS = "\nlabels: {a: retain}"
COLON = "put a text that has a colon and a space in quotes"
TAB = r"found character '\t' that cannot start any token"
ANOTHER = "found another document; write one document, without a second `---`"

MISTAKES = [
    ("labels: {en: retian}", f"labels.en: found 'retian', {TAKES} (did you mean retain?)"),
    ("labels: {en: Forget bio}", f"labels.en: found 'Forget bio', {TAKES} (did you mean forget:bio?)"),
    ("labels: {en: forget}", f"labels.en: found 'forget', {TAKES}"),
    ("labels: {en: {forget: bio}}", f"labels.en: found {{'forget': 'bio'}}, {TAKES}"),
    ("labels: {2.5: retain}", "labels: 2.5 is read as float; put the name of the category in quotes"),
    (
        "split: {by_missing: document, field: a}" + LABELS,
        "split: by_missing is set without by; add by: FIELD, or remove by_missing",
    ),
    ("labels: {}", f"labels: missing; it {EXAMPLE}"),
    ("", f"labels: missing; it {EXAMPLE}"),
    ("labels: [en]", f"labels: found ['en'], but it {EXAMPLE}"),
    ("labels: {en: drop}", "labels: every category is dropped; label one as retain, unlabeled or forget:<domain>"),
    (
        "lable: {en: retain}",
        f"2 problems\n  labels: missing; it {EXAMPLE}\n  lable: unknown key; did you mean labels?",
    ),
    ("txt: a" + LABELS, "txt: unknown key; did you mean text?"),
    ("text: [a]" + LABELS, "text: found [a], but it takes: text"),
    ("category: {feild: a}" + LABELS, "category.feild: unknown key; did you mean category.field?"),
    ("category: a" + LABELS, "category: found 'a'; write {field: a} for a field of the record, or {constant: a}"),
    (
        "category: {field: a, constant: b}" + LABELS,
        "category: needs exactly one of field, constant, path, any_of, got field, constant",
    ),
    ("split: {path: 'train'}" + LABELS, "split: path 'train' needs exactly one group in parentheses, it has 0"),
    (
        "split: {hash: {test: 5}}" + LABELS,
        "split.hash: found {test: 5}, but it takes: mapping of text to number from 0 to 1 or null",
    ),
    (
        "split: {hash: {test: 0.7, val: 0.5}}" + LABELS,
        "split: hash: the shares {'test': 0.7, 'val': 0.5} sum to more than 1",
    ),
    (
        "split: {hash: {tset: 0.1}}" + LABELS,
        "split: hash: training reads the splits train and test, not 'tset'; did you mean test?",
    ),
    ("- a", "holds list, not a mapping of keys such as `labels:`"),
    ("labels:\n  a: forget: bio", f"line 2, column 12: not valid YAML: mapping values are not allowed here; {COLON}"),
    ("labels:\n\ta: retain", f"line 2, column 1: not valid YAML: {TAB}; indent with spaces"),
    ("---\na: b\n---\n", f"line 3, column 1: not valid YAML: {ANOTHER}"),
    ("labels: {a: 'forget: bio'}", f"labels.a: found 'forget: bio', {TAKES} (did you mean forget:bio?)"),
    ("labels: {a: 'forget:bio '}", f"labels.a: found 'forget:bio ', {TAKES} (did you mean forget:bio?)"),
]


@pytest.mark.parametrize(("rules", "message"), MISTAKES)
def test_a_bad_rule_file_is_told_by_file_and_key(tmp_path, rules, message):
    (tmp_path / "rules.yaml").write_text(rules)
    with pytest.raises(ValueError) as caught:
        load_rules(tmp_path / "rules.yaml")
    assert str(caught.value) == f"{tmp_path / 'rules.yaml'}: {message}"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("labels: &a {b: *a}", "cannot be read: Circular reference"),
        ("labels: &a [*a]", "cannot be read: Circular reference"),
        ("labels: " + "[" * 3000, "nested too deeply"),
        ("labels: " + "7" * 5000, "cannot be read: .*4300 digits"),
    ],
    ids=["mapping", "list", "deep", "long"],
)
def test_yaml_that_cannot_be_read_is_named(tmp_path, rules, message):
    (tmp_path / "rules.yaml").write_text(rules)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/rules\.yaml: {message}"):
        load_rules(tmp_path / "rules.yaml")


def test_a_category_is_not_given_twice_in_two_spellings():
    """In YAML its keys are compared as text already."""
    for labels in ({1: "retain", "1": "drop"}, {True: "retain", "true": "drop"}):
        with pytest.raises(ValueError, match=r"(1|True) and '(1|true)' in quotes are the same category"):
            Rules(labels=labels)


def test_a_bare_no_is_a_language(tmp_path):
    """YAML 1.1 reads it as false."""
    (tmp_path / "rules.yaml").write_text("labels: {no: retain, on: drop}")
    assert load_rules(tmp_path / "rules.yaml").labels == {"no": "retain", "on": "drop"}


def test_a_folder_in_the_place_of_the_rule_file(tmp_path):
    with pytest.raises(ValueError) as caught:
        load_rules(tmp_path)
    assert str(caught.value) == f"--rules: {tmp_path} is a folder, but it takes a YAML file"


@pytest.mark.parametrize("page", ["README.md", "docs/data.md"])
def test_the_rule_files_in_the_documentation_are_valid(tmp_path, page):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text("utf-8"), re.S)
    examples = [block for block in blocks if re.search("^labels:", block, re.M)]
    assert examples
    for example in examples:
        (tmp_path / "rules.yaml").write_text(example)
        load_rules(tmp_path / "rules.yaml")


def test_the_documentation_has_exactly_the_keys_there_are():
    text = (ROOT / "docs/data.md").read_text("utf-8").partition("## Keys")[2].partition("## Examples")[0]
    names = re.findall(r"^\| `([a-z._]+)` \|", text, re.M)
    assert sorted(names) == sorted([*(key.name for key in keys(Rules)), "category", "split"])
    defaults = Rules(labels={"a": "retain"})
    assert "| `{field: category}` |" in text and defaults.category.field == "category"
    assert "| `{hash: {test: 0.05}}` |" in text and defaults.split.hash == {"test": 0.05}


def test_the_documentation_has_exactly_the_mixings_there_are():
    text = (ROOT / "docs/data.md").read_text("utf-8").partition("`data.mixing`")[2]
    assert re.findall(r"^\| `([a-z]+)`", text, re.M) == list(get_args(DataConfig.model_fields["mixing"].annotation))


def test_keys_that_are_not_set_leave_the_identity_of_older_rules():
    """Else `prepare` would begin again what an earlier version has begun."""
    plain = Rules(labels={"a": "retain"}).identity()
    assert "id" not in plain and "any_of" not in plain["category"] and "by_missing" not in plain["split"]
    several = Rules(labels={"a": "retain"}, category={"any_of": "topics"}, id="name").identity()
    assert (several["category"]["any_of"], several["id"]) == ("topics", "name")


def splits_of(shares: dict[str, float], count: int = 20_000) -> np.ndarray:
    rules = Rules(split={"hash": shares}, labels={"a": "retain"})
    return np.array([rules.split.split({}, "", "", i * 0x9E3779B97F4A7C15 % 2**64) for i in range(count)])


@pytest.mark.parametrize(
    ("shares", "rest"),
    [
        ({"test": 0.2, "val": 0.3, "dev": 0.1}, {"train": 0.4}),
        ({"train": 0.33, "test": 0.56, "val": 0.11}, {}),
        ({"test": 1}, {}),
    ],
)
def test_every_split_gets_its_share_and_train_the_rest(shares, rest):
    splits, expected = splits_of(shares), shares | rest
    assert set(splits) == set(expected)
    for name, share in expected.items():
        assert np.mean(splits == name) == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_the_split_says_nothing_of_the_applied_label(seed):
    ids = np.random.default_rng(0).integers(0, 2**63, 20_000).astype(np.uint64)
    rules = Rules(split={"hash": {"test": 0.1}}, labels={"a": "retain"})
    test = np.array([rules.split.split({}, "", "", int(i)) == "test" for i in ids])
    channel = LabelChannel.from_rows(LabelSpace(("es",)), {"retain": {"retain": 0.5, "unlabeled": 0.5}})
    _, applied = channel.apply(np.ones(len(ids), np.int64), ids, seed)
    assert set(applied) == {0, 1} and applied[test].mean() == pytest.approx(0.5, abs=0.05)


def test_spans_are_sorted_and_may_be_text():
    rules = Rules(split={"constant": "train"}, labels={"a": "retain", "b": "forget:b"}, spans="spans")
    record = {"text": "0123456789", "category": "a", "spans": [["7", "9", "b"], [0, 2, "b"], [3, 4, "b"]]}
    assert rules.document(record, "", "").spans == ((0, 2, "b"), (3, 4, "b"), (7, 9, "b"))


def test_every_field_that_the_rules_read_is_read(tmp_path):
    """Of a table the other columns stay on the disk."""
    record = {
        "body": "text",
        "meta": {"kind": "a"},
        "source": {"book": "b1"},
        "marks": [["0", "2", "a"]],
        "unused": 1,
    }
    parquet.write_table(pa.Table.from_pylist([record]), tmp_path / "a.parquet")
    rules = Rules.model_validate(
        {
            "text": "body",
            "category": {"field": "meta.kind"},
            "split": {"hash": {"test": 0.5}, "by": "source.book"},
            "labels": {"a": "retain"},
            "spans": "marks",
        }
    )
    (source,) = open_sources([tmp_path / "a.parquet"])
    (block,) = source.blocks(rules.columns)
    (row,) = block.records()
    assert set(row.fields) == set(record) - {"unused"}
    assert rules.document(row.fields, row.path, row.where).spans == ((0, 2, "a"),)
    by_field = Rules.model_validate({"split": {"field": "part"}, "labels": {"a": "retain"}})
    assert by_field.columns == ["category", "part", "text"]


SPLITS = {"tset": "test", "Test": "test", "tst": "test", "tesst": "test", "TRAIN": "train", "trian": "train"}
OTHERS = ("train", "test", "validation", "val", "dev", "holdout", "rest", "text", "test2", "train_b")


@pytest.mark.parametrize(("key", "selector"), [("category", CategorySelector), ("split", SplitSelector)])
def test_a_path_that_does_not_match_is_named_with_its_key(key, selector):
    message = rf"^a\.jsonl:2: {key}\.path 'books/\(\.\*\)' does not match the file's path 'data/a\.jsonl'$"
    with pytest.raises(ValueError, match=message):
        selector(path="books/(.*)").value({}, "data/a.jsonl", "a.jsonl:2")


@pytest.mark.parametrize("name", [*SPLITS, *OTHERS])
@pytest.mark.parametrize("selector", [SplitSelector(field="split"), SplitSelector(path="^(.*)$")])
def test_a_split_that_nothing_reads_is_refused_where_it_looks_like_a_slip(selector: SplitSelector, name: str):
    if name not in SPLITS:
        assert selector.split({"split": name}, name, "a.jsonl, line 3", 0) == name
        return
    message = f"a.jsonl, line 3: training reads the splits train and test, not {name!r}; did you mean {SPLITS[name]}?"
    with pytest.raises(ValueError, match=re.escape(message)):
        selector.split({"split": name}, name, "a.jsonl, line 3", 0)
