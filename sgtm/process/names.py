"""What an unknown name may be a slip of.

A slip is a few other characters, or a name that looks the same and is not: accents composed in two ways, spaces of
other kinds, invisible characters.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` may be a slip of, or None."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` where `word` may be a slip of a known one, or the note of `look_alike`; else nothing."""
    known = list(known)
    if note := look_alike(word, known):
        return note
    folded = {name.casefold(): name for name in known}
    close = nearest(word.casefold(), folded)
    return f" (did you mean {folded[close]}?)" if close else ""


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
