"""Names that look the same and are not: accents composed in two ways, spaces of other kinds, invisible characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable


def look_alike(name: str, known: Iterable[str]) -> str:
    """` (...)` for the end of a message about an unknown name, showing in ASCII how it differs from one of `known`.

    Empty where none of them looks the same. A macOS file name, for one, holds `é` as two characters, which an editor
    writes as one.
    """
    twins = [other for other in known if other != name and _appearance(other) == _appearance(name)]
    if not twins:
        return ""
    return f" ({name!a} and the known {twins[0]!a} look the same, but their characters differ; write both alike)"


def _appearance(name: str) -> str:
    """Unicode's NFKC, which composes accents and unifies spaces, without characters that are not printed (Cf)."""
    normal = unicodedata.normalize("NFKC", name)
    return "".join(character for character in normal if unicodedata.category(character) != "Cf")
