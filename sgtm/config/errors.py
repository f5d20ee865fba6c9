"""Errors of a config in the user's words: one line for each problem, with the key, what was found, what is right."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from sgtm.config.reference import describe_field, field_at, keys, section, yaml_text
from sgtm.process.names import nearest

Path = tuple[str, ...]


class ConfigError(ValueError):
    """A config that the user has to mend, as the message describes."""


def explain_errors(
    error: ValidationError, schema: type[BaseModel], values: dict, source: str, overridden: set[Path], merged: str = ""
) -> str:
    """The message for pydantic's errors about `values`.

    source      the preset or file
    overridden  paths that the command line set
    merged      all that the values come from, which a rule across keys names; default `source`
    """
    lines: dict[str, None] = {}  # an ordered set: a union reports one error for each of its members
    for problem in error.errors(include_url=False):
        lines[_line(problem, schema, values, overridden)] = None
    if len(lines) == 1:
        across = error.errors()[0]["type"] == "value_error" and not error.errors()[0]["loc"]
        return f"{merged or source if across else source}: {next(iter(lines))}"
    return f"{source}: {len(lines)} problems\n" + "\n".join(f"  {line}" for line in lines)


def _line(problem: ErrorDetails, schema: type[BaseModel], values: dict, overridden: set[Path]) -> str:
    path = tuple(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":  # a rule of ours, in its own words
        return ": ".join(filter(None, [".".join(path), problem["msg"].removeprefix("Value error, ")]))
    field, inside = field_at(schema, path)
    if field is not None:  # what follows the key are union members and positions, pydantic's own
        path = path[: len(path) - len(inside)]
    key = ".".join(path)
    if problem["type"] == "missing":
        return f"{key}: missing; it takes: {_takes(schema, path)}"
    origin = " on the command line" if any(one[: len(path)] == path for one in overridden) else ""
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        return f"{key}: unknown key{origin}; {_suggestion(schema, path)}"
    value = _value_at(values, path)
    syntax = _syntax(field, key, value) if origin and field is not None else ""
    return f"{key}: found {_shown(value)}{origin}, but it takes: {_takes(schema, path)}{syntax}"


def _syntax(field: FieldInfo, key: str, value: Any) -> str:
    """How a list or mapping is written on the command line, where something else was given for one."""
    takes = describe_field(field)
    if isinstance(value, (list, dict)):
        return ""
    if takes.startswith("list of"):
        items = re.split(r"[\s,]+", value) if isinstance(value, str) else [value]
        return f"; write --{key} '{yaml_text(items)}'"
    return f"; write --{key} '{{NAME: VALUE}}'" if takes.startswith("mapping of") else ""


def _value_at(values: Any, path: Path) -> Any:
    for name in path:
        values = values[name]
    return values


def _takes(schema: type[BaseModel], path: Path) -> str:
    field, _ = field_at(schema, path)
    return (
        describe_field(field)
        if field
        else f"a section with the keys {', '.join(_section_at(schema, path).model_fields)}"
    )


def _section_at(schema: type[BaseModel], path: Path) -> type[BaseModel]:
    for name in path:
        inner = section(schema.model_fields[name])
        assert inner is not None, f"{name} is no section"
        schema = inner
    return schema


def _suggestion(schema: type[BaseModel], path: Path) -> str:
    """The nearest key of the section, else a key that has this name elsewhere, else the keys of the section."""
    *sections, word = path
    known = list(_section_at(schema, tuple(sections)).model_fields)
    if not sections and word in [key.name for key in keys(schema)]:  # with its dots, as on the command line
        outer, _, inner = word.partition(".")
        return f"in a file write {outer}: {{{inner}: VALUE}}"
    close = nearest(word, known)
    elsewhere = [key.name for key in keys(schema) if key.name.rpartition(".")[2] == word]
    if close:
        return f"did you mean {'.'.join([*sections, close])}?"
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"known here: {', '.join(known)}"


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else yaml_text(value)
    return text if len(text) <= 80 else text[:77] + "..."
