"""Bytes as they are printed: in the unit that suits them."""

from __future__ import annotations

GB, MB = 1e9, 1e6


def unit(largest: float) -> tuple[str, float]:
    """(name, bytes) of the unit for numbers up to `largest` bytes."""
    return ("GB", GB) if largest >= GB else ("MB", MB)


def amount(size: float) -> str:
    """Bytes with their unit: `3.2 GB`, `0.5 MB`."""
    name, one = unit(size)
    return f"{size / one:.1f} {name}"
