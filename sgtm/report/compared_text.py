"""Two models on the same documents: their losses as a table, and token by token in colour, in the terminal and as HTML.

The HTML file needs nothing else and asks the network for nothing (`tests/unit/test_compared_text.py`).
"""

from __future__ import annotations

from pathlib import Path

from rich.color import Color, blend_rgb
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from sgtm.files import write_atomically
from sgtm.inference.comparison import LossTotal, TextComparison
from sgtm.report.coloured import FULL_SHADE, Coloured, coloured_passage
from sgtm.report.completions import printable
from sgtm.report.findings import error_of, signed
from sgtm.report.page import template
from sgtm.report.palette import INK, LIGHT, PAPER, RETAIN
from sgtm.report.terminal import plain_table
from sgtm.words import counted

FAINT = 5  # percent: tokens of a lower shade are left plain


def print_comparison_of_texts(comparison: TextComparison, console: Console | None = None) -> None:
    """Print both losses and their difference, nats per token, and below them the passages in colour."""
    console = console or Console()
    console.print(_table(comparison))
    for line in _notes(comparison):
        console.print(line, highlight=False, markup=False)
    for passage in map(coloured_passage, comparison.passages):
        console.print("", Text(printable(passage.category), style="dim"), passage_text(passage), sep="\n")


def write_comparison_of_texts(comparison: TextComparison, file: Path) -> Path:
    """Write the same as one HTML file, and return its path."""
    html = template("compared_text.html.j2").render(
        names=comparison.names,
        rows=_rows(comparison),
        notes=_notes(comparison),
        passages=[coloured_passage(passage) for passage in comparison.passages],
        full_shade=FULL_SHADE,
    )
    write_atomically(file, html)
    return file


def passage_text(passage: Coloured) -> Text:
    """Red where the second model's loss is higher, blue where it is lower, on the ground that the page has; plain where
    the difference is faint, so that a terminal's own colours stand."""
    text = Text()
    for token in passage.tokens:
        text.append(printable(token.text), style=_style(token.direction, token.shade))
    return text


def _style(direction: str, shade: int) -> Style:
    if not direction or shade < FAINT:
        return Style()
    paper, full = (
        Color.parse(LIGHT[name]).get_truecolor() for name in (PAPER, "domain-0" if direction == "up" else RETAIN)
    )
    return Style(color=LIGHT[INK], bgcolor=Color.from_triplet(blend_rgb(paper, full, shade / 100)))


def _rows(comparison: TextComparison) -> list[tuple[str, str, str]]:
    """Name, mean with its error, and sum, of both models and of the difference."""
    first, second = comparison.names
    totals = [(first, comparison.first), (second, comparison.second)]
    rows = [(name, f"{total.mean.value:.3f}{_error(total)}", f"{total.sum:,.1f}") for name, total in totals]
    difference = comparison.difference
    sum_of = f"{'+' if difference.sum > 0 else '−' if difference.sum < 0 else ''}{abs(difference.sum):,.1f}"
    return [*rows, ("difference", f"{signed(difference.mean.value, 3)}{_error(difference)}", sum_of)]


def _error(total: LossTotal) -> str:
    return "" if total.mean.error is None else f" ± {error_of(total.mean.error)}"


def _notes(comparison: TextComparison) -> list[str]:
    first, second = comparison.names
    notes = [
        f"{counted(comparison.tokens, 'token')} of {counted(comparison.documents, 'document')}; difference: {second} "
        f"minus {first}; ±: standard error over documents"
    ]
    if comparison.unpredicted:
        notes.append(
            f"{counted(comparison.unpredicted, 'document has', 'documents have')} less than two tokens, so no loss"
        )
    if comparison.passages:
        notes.append(f"red: the loss of {second} is higher; blue: it is lower; full colour from {FULL_SHADE:g} nats")
    return notes


def _table(comparison: TextComparison) -> Table:
    table = plain_table()
    table.add_column("loss")
    table.add_column("nats per token", justify="right")
    table.add_column("sum, nats", justify="right")
    for row in _rows(comparison):
        table.add_row(*map(Text, row))
    return table
