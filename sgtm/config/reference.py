"""The schema as text: what every key is called, what it takes, what it is without being set.

Errors, `sgtm train --help` and `docs/config.md` all speak from here, so a key is described in one way everywhere.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "anything"}


@dataclass(frozen=True)
class Words:
    """Beside a pattern in the annotation of a field: what it takes, in words that follow `text`."""

    text: str


@dataclass(frozen=True)
class Key:
    """One key of the schema.

    name      dotted, e.g. `model.layers`
    takes     what it takes, e.g. `whole number above 0`
    default   as it would be written in YAML, or None where the key must be given
    doc       what it means: the docstring of the field
    """

    name: str
    takes: str
    default: str | None
    doc: str


def keys(schema: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every key below `schema`, in the order of the schema."""
    for name, field in schema.model_fields.items():
        if inner := section(field):
            yield from keys(inner, f"{prefix}{name}.")
        else:
            doc = " ".join((field.description or "").split())
            yield Key(prefix + name, describe_field(field), _default(field), doc)


def section(field: FieldInfo | Any) -> type[BaseModel] | None:
    """The schema of a field that is a section of keys, else None."""
    annotation = field.annotation if isinstance(field, FieldInfo) else field
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted key. An empty mapping has none."""
    by_key: dict[str, Any] = {}
    for key, value in values.items():
        by_key |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return by_key


def field_at(schema: type[BaseModel], path: tuple[str, ...]) -> tuple[FieldInfo | None, tuple[str, ...]]:
    """(field that the path leads to or into, the rest of the path inside its value).

    The field is None where the path is a section or names nothing; the rest then is what could not be followed.
    """
    for depth, name in enumerate(path):
        field = schema.model_fields.get(name)
        if field is None:
            return None, path[depth:]
        inner = section(field)
        if inner is None:
            return field, path[depth + 1 :]
        schema = inner
    return None, ()


def describe_field(field: FieldInfo) -> str:
    return _describe(field.annotation, tuple(field.metadata))


def _describe(annotation: Any, bounds: tuple = ()) -> str:
    """A type in words: `whole number above 0`, `one of a, b`, `mapping of text to number`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(args[0], (*args[1:], *bounds))
    if origin in (Union, types.UnionType):
        options = [_describe(arg, bounds) for arg in args if arg is not type(None)]
        return " or ".join(options + ["null"] * (type(None) in args))
    if origin is Literal:
        return "one of " * (len(args) > 1) + ", ".join(str(arg) for arg in args)
    if origin is dict:
        return f"mapping of {_describe(args[0])} to {_nested(args[1])}"
    if origin is list:
        return f"list of {_nested(args[0])}"
    if origin is tuple:
        return f"list of {len(args)}: {', '.join(_describe(arg) for arg in args)}"
    return NAMES[annotation] + _range(bounds)


def _nested(annotation: Any) -> str:
    text = _describe(annotation)
    return f"({text})" if " or " in text or text.startswith("mapping") else text


def _range(bounds: tuple) -> str:
    """Pydantic wraps limits in FieldInfo where they come from a nested Annotated."""
    flat = [limit for bound in bounds for limit in (bound.metadata if isinstance(bound, FieldInfo) else [bound])]
    if words := next((bound for bound in flat if isinstance(bound, Words)), None):
        return f" {words.text}"
    low = next((b for b in flat if isinstance(b, (Gt, Ge))), None)
    high = next((b for b in flat if isinstance(b, (Le, Lt))), None)
    if isinstance(low, Ge) and high is not None:
        return f" from {low.ge} to {high.le}" if isinstance(high, Le) else f" from {low.ge} to below {high.lt}"
    if isinstance(low, Gt) and isinstance(high, Lt):
        return f" above {low.gt} and below {high.lt}"
    if low is None:
        return ""
    return f" above {low.gt}" if isinstance(low, Gt) else f", {low.ge} or more"


def _default(field: FieldInfo) -> str | None:
    value = field.get_default(call_default_factory=True)
    return None if value is PydanticUndefined else yaml_text(value)


def yaml_text(value: Any) -> str:
    """A value as one would write it in YAML, on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {yaml_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(yaml_text(item) for item in value) + "]"
    return str(value)


def markdown(schema: type[BaseModel]) -> str:
    """The reference of all keys: one table for each section."""
    lines = [
        "# Configuration",
        "",
        "Written by `sgtm config --markdown > docs/config.md` from `sgtm/config/`; do not edit by hand.",
        "",
        "One rule: defaults < YAML < command line. A YAML file may start from a preset or another file with",
        "`extends: PRESET|FILE`; on the command line every key is an option, `--model.layers 4`.",
    ]
    current = None
    for key in keys(schema):
        owner = key.name.rpartition(".")[0]
        if owner != current:
            current = owner
            about = section(schema.model_fields[owner]).__doc__ if owner else schema.__doc__
            lines += ["", f"## {owner or 'run'}", "", (about or "").strip(), ""]
            lines += ["| key | takes | default | meaning |", "|---|---|---|---|"]
        default = "required" if key.default is None else f"`{key.default}`"
        cells = (f"`{key.name}`", key.takes, default, key.doc)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
