"""Tables of the reports."""

from __future__ import annotations


def spread(values: dict[str, float]) -> str:
    return " / ".join(f"{values[p]:.3f}" for p in ("p20", "p50", "p80"))


def markdown(table: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])
