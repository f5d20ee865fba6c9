"""What an audit has checked, and what it has found."""

from __future__ import annotations

from dataclasses import dataclass, field


class Skipped(Exception):
    """A check that cannot be made; the message is the reason."""


@dataclass
class Check:
    """One question about a folder.

    problems  where and what; none: the check has passed
    skipped   why the question was not asked; empty where it was
    """

    name: str
    about: str
    problems: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def passed(self) -> bool:
        return not self.problems

    @property
    def outcome(self) -> str:
        return "FAILED" if self.problems else "skipped" if self.skipped else "passed"


def differing(what: str, actual: dict, expected: dict) -> list[str]:
    """A line for every key in which two mappings differ: mappings in them key by key, lists of one length by number."""
    lines = []
    for key in [*expected, *(key for key in actual if key not in expected)]:
        mine, right = actual.get(key), expected.get(key)
        if key not in actual:
            lines.append(f"{what}: {key} is missing")
        elif key not in expected:
            lines.append(f"{what}: {key} should not be there: {_short(mine)}")
        elif isinstance(mine, dict) and isinstance(right, dict):
            lines += differing(f"{what}: {key}", mine, right)
        elif isinstance(mine, list) and isinstance(right, list) and len(mine) == len(right):
            lines += differing(f"{what}: {key}", dict(enumerate(mine)), dict(enumerate(right)))
        elif mine != right:
            lines.append(f"{what}: {key} is {_short(mine)}, should be {_short(right)}")
    return lines


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
