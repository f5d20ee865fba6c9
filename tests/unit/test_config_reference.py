"""The reference of all keys: what each is called, what it takes, what it is without being set."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field, PositiveInt

from sgtm.config import Config
from sgtm.config.reference import Key, Words, field_at, flat, keys, markdown, yaml_text
from sgtm.config.sections import Section

ROOT = Path(__file__).parents[2]


def test_committed_reference_is_current():
    assert (ROOT / "docs" / "config.md").read_text("utf-8") == markdown(Config), (
        "run: sgtm config --markdown > docs/config.md"
    )


def test_reference_names_every_key_once():
    names = [key.name for key in keys(Config)]
    assert len(names) == len(set(names)) > 40
    assert {"model.layers", "optimizer.masked_update", "name"} <= set(names)


class Inner(Section):
    """What is inside."""

    share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """A share,
    over two lines."""
    either: PositiveInt | Literal["all", "none"] | None = None
    """One | the other."""


class Outer(Section):
    """All of it."""

    steps: Annotated[int, Field(gt=0, lt=9)]
    """How many."""
    inner: Inner = Inner()
    rows: dict[str, dict[str, bool]] = {"a": {"b": True}}
    """By name."""
    pair: tuple[int, float] = (1, 2.5)
    parts: list[Annotated[int, Field(ge=0)] | str] = []
    word: Annotated[str, Field(pattern="^a$"), Words("that is an a")] = "a"


def test_a_key_is_described_by_its_type_limits_default_and_docstring():
    assert list(keys(Outer)) == [
        Key("steps", "whole number above 0 and below 9", None, "How many."),
        Key("inner.share", "number from 0 to below 1", "0.5", "A share, over two lines."),
        Key("inner.either", "whole number above 0 or one of all, none or null", "null", "One | the other."),
        Key("rows", "mapping of text to (mapping of text to (true or false))", "{a: {b: true}}", "By name."),
        Key("pair", "list of 2: whole number, number", "[1, 2.5]", ""),
        Key("parts", "list of (whole number, 0 or more or text)", "[]", ""),
        Key("word", "text that is an a", "a", ""),
    ]


def test_the_reference_has_a_table_for_each_section():
    *_, header, rule, share, either, _, run, _, about, _, _, _, rows, pair, _, word = markdown(Outer).splitlines()
    assert (header, rule) == ("| key | takes | default | meaning |", "|---|---|---|---|")
    assert share == "| `inner.share` | number from 0 to below 1 | `0.5` | A share, over two lines. |"
    assert either.endswith("| `null` | One \\| the other. |"), "a bar does not end the cell"
    assert (run, about) == ("## run", "All of it.")
    assert [line.split("`")[1] for line in (rows, pair, word)] == ["rows", "pair", "word"]
    assert "| `steps` | whole number above 0 and below 9 | required | How many. |" in markdown(Outer).splitlines()


@pytest.mark.parametrize(
    ("path", "name", "inside"),
    [
        (("inner", "share"), "share", ()),
        (("rows", "a", "b"), "rows", ("a", "b")),
        (("inner",), None, ()),
        (("inner", "none", "x"), None, ("none", "x")),
    ],
)
def test_a_path_leads_to_a_field_or_into_its_value(path, name, inside):
    fields = {**Outer.model_fields, **Inner.model_fields}
    assert field_at(Outer, path) == (None if name is None else fields[name], inside)


def test_values_are_flat_by_dotted_key():
    assert flat({"a": {"b": 1, "c": {"d": [2]}, "e": {}}, "f": None}) == {"a.b": 1, "a.c.d": [2], "f": None}


@pytest.mark.parametrize("value", [None, True, 3, "text", [1, [False]], {"a": {"b": None}, "c": []}])
def test_a_value_is_written_as_yaml_on_one_line(value):
    text = yaml_text(value)
    assert yaml.safe_load(text) == value and "\n" not in text
