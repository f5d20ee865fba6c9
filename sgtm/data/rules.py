"""The rule file: how a record becomes a document with a category, a split and a true label.

    text: text                            # field that holds the text
    category: {field: category}           # or {constant: en}, or {path: '([^/]+)/[^/]+$'}, a regular expression,
                                          # or {any_of: topics}: of several categories the one first in `labels`
    split: {hash: {test: 0.05}, by: book} # or field, constant, path; by: what stays together, default the document
    labels: {en: retain, es: forget:es, fr: drop}
    spans: spans                          # optional: field with [[start, end, category], ...], in characters
    id: doc_id                            # optional: field whose repeated values are reported

Files of plain text are records with the fields `text` and `category` (the folder's name), so the defaults fit them.
`docs/data.md` is the reference for users.
"""

from __future__ import annotations

import hashlib
import json
import re
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from sgtm.masking.channel import uniform_hash
from sgtm.masking.labels import RESERVED
from sgtm.process.names import did_you_mean
from sgtm.words import counted

DROP = "drop"
LABELS = ("retain", "unlabeled", DROP)
"""What a category may be but for `forget:<domain>`."""
SPLITS = ("train", "test")
"""What training and evaluation read; a split of another name is for `sgtm eval --split`."""
SLIP = 0.8  # similarity: `tst` and `tran` are above it, `rest` and `text` below
_SPLIT_SEED = 2**32 + 1  # label draws use the seeds of configs, which are small: a split is independent of them
_ROUNDING = 1e-9  # 0.33 + 0.56 + 0.11 is 1.0000000000000002


class RuleSection(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Selector(RuleSection):
    """Where a value comes from: exactly one of the keys."""

    KEY: ClassVar[str]
    """Of a rule file."""
    field: str | None = None
    """Field of the record; `a.b` goes into nested ones."""
    constant: str | None = None
    path: str | None = None
    """Regular expression with one group, searched in the file's path as it was given; the last match counts."""

    @model_validator(mode="before")
    @classmethod
    def _no_bare_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(
                f"found {value!r}; write {{field: {value}}} for a field of the record, or {{constant: {value}}}"
            )
        return value

    @model_validator(mode="after")
    def _one(self):
        choices = [name for name in type(self).model_fields if not name.startswith("by")]
        chosen = [name for name in choices if getattr(self, name) is not None]
        if len(chosen) != 1:
            raise ValueError(f"needs exactly one of {', '.join(choices)}, got {', '.join(chosen) or 'none'}")
        if self.path is not None:
            try:
                groups = re.compile(self.path).groups
            except re.error as error:
                raise ValueError(f"path {self.path!r} is not a regular expression: {error}") from None
            if groups != 1:
                raise ValueError(f"path {self.path!r} needs exactly one group in parentheses, it has {groups}")
        return self

    def value(self, record: dict, path: str, where: str) -> str:
        if self.field is not None:
            return as_text(lookup(record, self.field, where), self.field, where)
        if self.constant is not None:
            return self.constant
        assert self.path is not None  # the last of the keys, of which one is set
        matches = re.findall(self.path, path)
        if not matches:
            raise ValueError(f"{where}: {self.KEY}.path {self.path!r} does not match the file's path {path!r}")
        return checked(matches[-1], f"the match of {self.KEY}.path {self.path!r}", where)


class CategorySelector(Selector):
    KEY = "category"
    any_of: str | None = None
    """Field with several categories in a list: the one that is first in `labels` counts."""


@lru_cache
def _split_meant(name: str) -> str | None:
    """The split that training or evaluation reads of which `name` is a slip: case, two letters, one letter."""
    word = name.lower()
    for known in () if name in SPLITS else SPLITS:
        near = known not in word and SequenceMatcher(None, word, known).ratio() > SLIP
        if near or sorted(word) == sorted(known):
            return known
    return None


def _checked_split(name: str, where: str) -> str:
    """Returns the name of a split. Raises ValueError where it looks like a misspelled `train` or `test`."""
    if known := _split_meant(name):
        raise ValueError(f"{where}: training reads the splits train and test, not {name!r}; did you mean {known}?")
    return name


class SplitSelector(Selector):
    KEY = "split"
    hash: dict[str, Annotated[float, Field(ge=0, le=1)]] | None = None
    """Share of each split, drawn by a hash; what is left is `train`."""
    by: str | None = None
    """With `hash`: field whose value keeps documents together (all of a book in one split); default the text."""
    by_missing: Literal["refuse", "document"] | None = None
    """With `by`: what a record without a value is, null or empty: an error (`refuse`, the default), or a group of its
    own (`document`), drawn by its text."""

    @model_validator(mode="after")
    def _shares(self):
        if self.hash is not None and sum(self.hash.values()) > 1 + _ROUNDING:
            raise ValueError(f"hash: the shares {self.hash} sum to more than 1")
        for name in self.hash or ():
            _checked_split(name, "hash")
        if self.by is not None and self.hash is None:
            raise ValueError("by is set without hash; add hash: {test: 0.05}, or remove by")
        if self.by_missing is not None and self.by is None:
            raise ValueError("by_missing is set without by; add by: FIELD, or remove by_missing")
        return self

    def split(self, record: dict, path: str, where: str, document_id: int) -> str:
        if self.hash is None:
            return _checked_split(self.value(record, path, where), where)
        key = document_id if self.by is None else self._key(self.by, record, where, document_id)
        draw, edge = float(uniform_hash(np.array([key], np.uint64), _SPLIT_SEED)[0]), 0.0
        for name, share in self.hash.items():
            edge += share
            if draw < edge or edge > 1 - _ROUNDING:  # no draw is left for `train` where the shares sum to 1
                return name
        return "train"

    def _key(self, by: str, record: dict, where: str, document_id: int) -> int:
        try:
            value = lookup(record, by, where)
        except ValueError:
            if self.by_missing != "document":
                raise
            value = None
        if is_missing(value):
            if self.by_missing == "document":
                return document_id
            content = "null" if value is None else repr(value)
            raise ValueError(
                f"{where}: field {by!r} of split.by holds {content}, and all documents like it would be one group; "
                f"give it a value, or write by_missing: document to draw each by its own text"
            )
        if isinstance(value, bool):
            return stable_id(str(value).encode())
        return stable_id(as_text(value, by, where).encode())


class Document(NamedTuple):
    """One record, read by the rules.

    spans  (start, end, category) in characters, sorted, not overlapping
    name   its value of the rules' field `id`
    """

    text: str
    id: int
    category: str
    split: str
    spans: tuple[tuple[int, int, str], ...]
    name: str | None = None


def _known_label(label: Any) -> str:
    if isinstance(label, str) and (label in LABELS or re.fullmatch(r"forget:(?! )[^:,]+(?<! )", label)):
        if (domain := label.removeprefix("forget:")) != label and domain in RESERVED:
            raise ValueError(f"found {label!r}, but these names are reserved: {', '.join(RESERVED)}; rename the domain")
        return label
    near = re.fullmatch(r"(?i)forget[\s:_-]+([^:,]+?)\s*", str(label))
    slip = f" (did you mean forget:{near[1]}?)" if near else did_you_mean(str(label), LABELS)
    raise ValueError(f"found {label!r:.80}, but it takes: retain, unlabeled, forget:<domain> or drop{slip}")


class Rules(RuleSection):
    """A rule file. Raises ValidationError, a ValueError, for a key or value that makes no sense."""

    text: str = "text"
    """Field that holds the text."""
    category: CategorySelector = CategorySelector(field="category")
    split: SplitSelector = SplitSelector(hash={"test": 0.05})
    labels: dict[str, Annotated[str, BeforeValidator(_known_label)]] = Field({}, validate_default=True)
    """True label of each category: `retain`, `unlabeled`, `forget:<domain>`, or `drop` to leave it out."""
    spans: str | None = None
    """Field with `[[start, end, category], ...]`, in characters."""
    id: str | None = None
    """Field with a name of the document; how many documents share one is printed."""

    @field_validator("labels", mode="before")
    @classmethod
    def _named(cls, labels: Any) -> Any:
        if not labels or not isinstance(labels, dict):
            problem = f"found {labels!r:.80}, but it" if labels else "missing; it"
            raise ValueError(f"{problem} takes the true label of each category: {{web: retain, virology: forget:bio}}")
        odd = [category for category in labels if not isinstance(category, str | int)]
        if odd:
            raise ValueError(f"{odd[0]!r} is read as {type(odd[0]).__name__}; put the name of the category in quotes")
        named = {category_name(category): label for category, label in labels.items()}
        if len(named) < len(labels):
            twice = [
                category for category in labels if not isinstance(category, str) and category_name(category) in labels
            ]
            raise ValueError(f"{twice[0]!r} and {category_name(twice[0])!r} in quotes are the same category")
        return named

    @field_validator("labels")
    @classmethod
    def _some_kept(cls, labels: dict[str, str]) -> dict[str, str]:
        if set(labels.values()) == {DROP}:
            raise ValueError("every category is dropped; label one as retain, unlabeled or forget:<domain>")
        return labels

    @property
    def categories(self) -> dict[str, str]:
        """The categories that are kept, with their label."""
        return {category: label for category, label in self.labels.items() if label != DROP}

    @property
    def columns(self) -> list[str]:
        """Top-level fields that the rules read."""
        category, split = self.category, self.split
        fields = [self.text, category.field, category.any_of, split.field, split.by, self.spans, self.id]
        return sorted({field.split(".")[0] for field in fields if field})

    def identity(self) -> dict:
        """What the documents depend on, for JSON; keys that are not set are left out where they are new."""
        values = self.model_dump()
        for part, name in ((values, "id"), (values["category"], "any_of"), (values["split"], "by_missing")):
            if part[name] is None:
                del part[name]
        return values

    def document(self, record: dict, path: str, where: str) -> Document | None:
        """The document of a record, with empty text where there is none; None where its category is dropped.

        Raises ValueError that begins with `where` for a missing field, an unknown category, or spans that do not fit.
        """
        any_of = self.category.any_of
        if any_of is None:
            category = self.category.value(record, path, where)
        else:
            category = self._first(lookup(record, any_of, where), any_of, where)
        if self._label(category, where) == DROP:
            return None
        text = lookup(record, self.text, where)
        if text is None:
            text = ""
        if not isinstance(text, str):
            raise ValueError(f"{where}: field {self.text!r} holds {type(text).__name__}, expected text")
        document_id = stable_id(checked(text, "the text", where).encode())
        split = self.split.split(record, path, where, document_id)
        name = None if self.id is None else as_text(lookup(record, self.id, where), self.id, where)
        return Document(text, document_id, category, split, self._spans(record, text, where), name)

    def _first(self, value: Any, field: str, where: str) -> str:
        """Of the categories in a field, the one that comes first in `labels`."""
        categories = [as_text(one, field, where) for one in (value if isinstance(value, list) else [value])]
        if not categories:
            raise ValueError(f"{where}: field {field!r} holds an empty list, expected categories")
        for category in categories:
            self._label(category, where)
        return min(categories, key=list(self.labels).index)

    def _label(self, category: str, where: str) -> str:
        if category not in self.labels:
            raise ValueError(
                f"{where}: unknown category {category!r}{did_you_mean(category, self.labels)}; labels has "
                f"{', '.join(self.labels)}; add it there, or map it to drop"
            )
        return self.labels[category]

    def _spans(self, record: dict, text: str, where: str) -> tuple[tuple[int, int, str], ...]:
        if self.spans is None:
            return ()
        spans = lookup(record, self.spans, where) or []
        end_of_last = 0
        try:
            spans = sorted((_position(start), _position(end), category_name(name)) for start, end, name in spans)
        except (TypeError, ValueError):
            raise ValueError(
                f"{where}: spans must be [[start, end, category], ...] in whole numbers, got {spans!r:.80}"
            ) from None
        for start, end, category in spans:
            if not end_of_last <= start < end <= len(text):
                raise ValueError(
                    f"{where}: span {[start, end, category]} is empty, overlaps another one or lies outside the text "
                    f"of {counted(len(text), 'character')}"
                )
            if self._label(category, where) == DROP:
                raise ValueError(f"{where}: span {[start, end, category]}: a span's category cannot be dropped")
            end_of_last = end
        return tuple(spans)


def category_name(value: Any) -> str:
    """A category as text: of true and false as JSON has them, of numbers in digits."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_text(value: Any, field: str, where: str) -> str:
    """A field's value as text. Raises ValueError for null, NaN, blank text, a list or object, and as `checked`."""
    if is_missing(value) or isinstance(value, list | dict):
        content = "null" if value is None else type(value).__name__ if isinstance(value, list | dict) else repr(value)
        raise ValueError(f"{where}: field {field!r} holds {content}, expected text")
    return checked(category_name(value), f"field {field!r}", where)


def is_missing(value: Any) -> bool:
    """Null, blank text, or a number that is none, as tables have it for null."""
    return value is None or (isinstance(value, str) and not value.strip()) or value != value


def checked(text: str, what: str, where: str) -> str:
    """The text. Raises ValueError where it cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        flaw, remedy = f"half a surrogate pair (\\u{code:04x})", "write both halves, or remove it"
        if 0xDC80 <= code <= 0xDCFF and f"\\x{code - 0xDC00:02x}" in where:  # Python reads such a byte of a name so
            flaw, remedy = f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8,", "rename the file or folder"
        raise ValueError(f"{where}: {what} has {flaw} at character {error.start}; {remedy}") from None
    return text


def _position(value: Any) -> int:
    """A whole number, or text of one, as Arrow has no lists of numbers and text. Raises TypeError or ValueError."""
    if isinstance(value, bool | float):
        raise TypeError
    return int(value)


def stable_id(data: bytes) -> int:
    """64-bit hash: the same on every machine, whatever else is in the corpus."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def lookup(record: dict, field: str, where: str) -> Any:
    """The value of a field, `a.b` going into nested ones. Raises ValueError that lists the fields
    of the record, or of the nested one."""
    value: Any = record
    if field in record:
        return record[field]
    outer = ""
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            if not isinstance(value, dict) or not value:
                value, outer = record, ""
            known = [f"{outer}{key}" for key in value]
            holder = outer.removesuffix(".") or "the record"
            listing = ", ".join(known) or "none"
            raise ValueError(f"{where}: no field {field!r}{did_you_mean(field, known)}; {holder} has {listing}")
        value, outer = value[name], f"{outer}{name}."
    return value


def load_rules(path: str | Path) -> Rules:
    """Reads a rule file. Raises ValueError naming the file, the key, what was found and what would be right."""
    from sgtm.config.errors import explain_errors
    from sgtm.config.load import parse_yaml

    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ValueError(f"no rule file at {path}") from None
    except IsADirectoryError:
        raise ValueError(f"--rules: {path} is a folder, but it takes a YAML file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    try:
        json.dumps(content, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path}: half a surrogate pair in a text; write both halves, or remove it") from None
    if not isinstance(content := {} if content is None else content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, not a mapping of keys such as `labels:`")
    try:
        return Rules.model_validate(content)
    except ValidationError as error:
        raise ValueError(explain_errors(error, Rules, content, str(path), set())) from None
