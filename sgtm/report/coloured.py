"""Held-out passages as coloured text: what removing a domain does to the loss of every token."""

from __future__ import annotations

from typing import NamedTuple

from sgtm.masking.labels import FULL

FULL_SHADE = 4.0
"""Nats of difference from which on the colour gets no stronger."""


class Token(NamedTuple):
    """direction: `up` where removal raises the loss, `down` where it lowers it, empty without one; shade: percent."""

    text: str
    direction: str
    shade: int
    tooltip: str


class Coloured(NamedTuple):
    """condition: the model that is compared with the full one."""

    category: str
    condition: str
    tokens: list[Token]


def coloured(summary: dict) -> list[Coloured]:
    """Of the passages in a `summary.json`; none in one of an older version."""
    shown = []
    for passage in summary.get("passages", ()):
        full = passage["losses"][FULL]
        condition = next(name for name in passage["losses"] if name != FULL)
        triples = zip(passage["tokens"], full, passage["losses"][condition], strict=True)
        tokens = [_token(text, before, after, condition) for text, before, after in triples]
        shown.append(Coloured(passage["category"], condition, tokens))
    return shown


def _token(text: str, full: float | None, without: float | None, condition: str) -> Token:
    if full is None or without is None:
        return Token(text, "", 0, "")
    difference = without - full
    shade = round(100 * min(1.0, abs(difference) / FULL_SHADE))
    tooltip = f"{full:.2f} full, {without:.2f} {condition}"
    return Token(text, "up" if difference > 0 else "down" if difference < 0 else "", shade, tooltip)
