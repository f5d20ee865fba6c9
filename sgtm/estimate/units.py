"""Numbers as they are printed: bytes in the unit that suits them, and what is counted in the singular or plural."""

from __future__ import annotations

GB, MB = 1e9, 1e6


def unit(largest: float) -> tuple[str, float]:
    """(name, bytes) of the unit for numbers up to `largest` bytes."""
    return ("GB", GB) if largest >= GB else ("MB", MB)


def amount(size: float) -> str:
    """Bytes with their unit: `3.2 GB`, `0.5 MB`."""
    name, one = unit(size)
    return f"{size / one:.1f} {name}"


def counted(number: int, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def listed(values: list[int]) -> str:
    """`1, 2 or 4`."""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
