"""Completions of one prompt by several models, side by side in the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sgtm.inference.decoding import Completion
from sgtm.words import counted

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """The text without control characters but tabs and line ends, so that none reaches the terminal: a model may have
    learned escape sequences. Unicode's pictures, such as `␛`, stand for them, and `�` for those without one."""
    return _CONTROLS.sub(lambda match: chr(0x2400 + ord(match[0])) if match[0] < " " else "�", text)


def described_end(completion: Completion) -> str:
    """How long a completion is and why it ended, such as `12 tokens, end of text`."""
    reasons = {"tokens": "", "end": ", end of text", "context": ", context full"}
    return f"{counted(len(completion.ids), 'token')}{reasons[completion.ended]}"


def print_completions(prompt: str, completions: Mapping[str, Completion], console: Console | None = None) -> None:
    """Print a column for each model: the prompt dim, and what follows.

    completions  by name of the model
    """
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, show_footer=True)
    for name, completion in completions.items():
        table.add_column(Text(name), footer=Text(described_end(completion), style="dim"), ratio=1, overflow="fold")
    table.add_row(
        *(Text.assemble((printable(prompt), "dim"), printable(of.text)) for of in completions.values()),
    )
    table.expand = len(completions) > 1
    (console or Console()).print(table)
