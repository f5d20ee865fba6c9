"""Masked operations of Selective GradienT Masking: every op in a folder, its plain-PyTorch reference beside it."""

import sys
from functools import cache

RENAMED = {"runs": "torch"}
"""Old names of backends, accepted until version 0.3."""


def current_name(backend: str) -> str:
    """The name that a backend has now; prints a note for an old one, once."""
    if backend in RENAMED:
        _note_renamed(backend)
    return RENAMED.get(backend, backend)


@cache
def _note_renamed(backend: str) -> None:
    print(f"note: kernel backend {backend!r} is now {RENAMED[backend]!r}", file=sys.stderr)
