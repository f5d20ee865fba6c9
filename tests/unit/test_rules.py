"""The rule file: every mistake is told by file and key, with what was found and what would be right."""

import re
from pathlib import Path
from typing import get_args

import pytest

from sgtm.config.reference import keys
from sgtm.config.schema import DataConfig
from sgtm.data.rules import Rules, load_rules

ROOT = Path(__file__).parents[2]
TAKES = "but it takes: retain, unlabeled, forget:<domain> or drop"
EXAMPLE = "takes the true label of each category: {web: retain, virology: forget:bio}"
LABELS = "\nlabels: {a: retain}"

MISTAKES = [
    ("labels: {en: retian}", f"labels.en: found 'retian', {TAKES} (did you mean retain?)"),
    ("labels: {en: Forget bio}", f"labels.en: found 'Forget bio', {TAKES} (did you mean forget:bio?)"),
    ("labels: {en: forget}", f"labels.en: found 'forget', {TAKES}"),
    ("labels: {en: {forget: bio}}", f"labels.en: found {{'forget': 'bio'}}, {TAKES}"),
    ("labels: {2020: retain}", "labels: 2020 is read as int; put the name of the category in quotes"),
    ("labels: {}", f"labels: missing; it {EXAMPLE}"),
    ("", f"labels: missing; it {EXAMPLE}"),
    ("labels: [en]", f"labels: found ['en'], but it {EXAMPLE}"),
    ("labels: {en: drop}", "labels: every category is dropped"),
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
        "category: needs exactly one of field, constant, path, got field, constant",
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
    ("- a", "holds list, not a mapping of keys such as `labels:`"),
    ("labels:\n  a: forget: bio", "line 2, column 12: not valid YAML: mapping values are not allowed here"),
]


@pytest.mark.parametrize(("rules", "message"), MISTAKES)
def test_a_bad_rule_file_is_told_by_file_and_key(tmp_path, rules, message):
    (tmp_path / "rules.yaml").write_text(rules)
    with pytest.raises(ValueError) as caught:
        load_rules(tmp_path / "rules.yaml")
    assert str(caught.value) == f"{tmp_path / 'rules.yaml'}: {message}"


def test_a_bare_no_is_a_language(tmp_path):
    """YAML 1.1 reads it as false."""
    (tmp_path / "rules.yaml").write_text("labels: {no: retain, on: drop}")
    assert load_rules(tmp_path / "rules.yaml").labels == {"no": "retain", "on": "drop"}


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
    found = re.findall(r"^\| `([a-z.]+)` \|", text, re.M)
    assert sorted(found) == sorted([*(key.name for key in keys(Rules)), "category", "split"])
    defaults = Rules(labels={"a": "retain"})
    assert "| `{field: category}` |" in text and defaults.category.field == "category"
    assert "| `{hash: {test: 0.05}}` |" in text and defaults.split.hash == {"test": 0.05}


def test_the_documentation_has_exactly_the_mixings_there_are():
    text = (ROOT / "docs/data.md").read_text("utf-8").partition("`data.mixing`")[2]
    assert re.findall(r"^\| `([a-z]+)`", text, re.M) == list(get_args(DataConfig.model_fields["mixing"].annotation))
