"""Numbers and lists in the sentences that programs print."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, one: str, several: str | None = None) -> str:
    """`1 rank`, `2,048 ranks`. several: the plural, verb included if `one` has one; None: `one` with an s."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def listed(words: Sequence[object], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`; last: the word before the last one."""
    *most, end = map(str, words)
    return f"{', '.join(most)} {last} {end}" if most else end
