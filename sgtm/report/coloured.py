"""Passages as coloured text: what removing a domain, or another model, does to the loss of every token."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sgtm.masking.labels import FULL

if TYPE_CHECKING:
    from sgtm.evaluation.passages import Passage

FULL_SHADE = 4.0
"""Nats of difference from which on the colour gets no stronger."""


class Token(NamedTuple):
    """direction: `up` where the second model's loss is higher, as after removal, `down` where it is lower, empty
    without either; shade: percent."""

    text: str
    direction: str
    shade: int
    tooltip: str


class Coloured(NamedTuple):
    """condition: the model that is compared with `base`, the full one."""

    category: str
    condition: str
    tokens: list[Token]
    base: str = FULL


def coloured(summary: dict) -> list[Coloured]:
    """Of the passages in a `summary.json`; none in one of an older version."""
    return [coloured_passage(passage) for passage in summary.get("passages", ())]


def coloured_passage(passage: Passage) -> Coloured:
    """The first model of the passage's losses is compared with the second; colours of one alone are none."""
    base, condition = [*passage["losses"], ""][:2]
    before = passage["losses"][base]
    after = passage["losses"].get(condition) or [None] * len(before)
    triples, names = zip(passage["tokens"], before, after, strict=True), (base, condition)
    tokens = [_token(text, full, without, names) for text, full, without in triples]
    return Coloured(passage["category"], condition, tokens, base)


def _token(text: str, full: float | None, without: float | None, names: tuple[str, str]) -> Token:
    if full is None or without is None:
        return Token(text, "", 0, "" if full is None else f"{full:.2f} {names[0]}")
    difference = without - full
    shade = round(100 * min(1.0, abs(difference) / FULL_SHADE))
    tooltip = f"{full:.2f} {names[0]}, {without:.2f} {names[1]}"
    return Token(text, "up" if difference > 0 else "down" if difference < 0 else "", shade, tooltip)
