"""Two models' losses of a text, in the terminal and as one HTML file: the same numbers, in colour token by token."""

from __future__ import annotations

import io
import re

import pytest
from pages import Page
from rich.console import Console

from sgtm.evaluation.estimates import Estimate
from sgtm.inference.comparison import LossTotal, TextComparison
from sgtm.report.coloured import coloured_passage
from sgtm.report.compared_text import passage_text, print_comparison_of_texts, write_comparison_of_texts

PASSAGE = {
    "category": "a.jsonl:1",
    "tokens": ["<b>", "\x1b[1m", "c", "d"],
    "losses": {"full": [None, 1.0, 6.0, 3.0], "without es": [None, 3.0, 1.0, 3.1]},
}
COMPARISON = TextComparison(
    ("full", "without es"),
    LossTotal(1234.5, Estimate(3.25, 0.05)),
    LossTotal(1334.5, Estimate(3.5, None)),
    LossTotal(-100.0, Estimate(-0.25, 0.01)),
    documents=2,
    tokens=1380,
    unpredicted=1,
    passages=[PASSAGE],
)
ROWS = [
    ["loss", "nats per token", "sum, nats"],
    ["full", "3.250 ± 0.050", "1,234.5"],
    ["without es", "3.500", "1,334.5"],
    ["difference", "−0.250 ± 0.010", "−100.0"],
]
NOTES = (
    "1,380 tokens of 2 documents; difference: without es minus full",
    "1 document has less than two tokens, so no loss",
    "red: the loss of without es is higher; blue: it is lower; full colour from 4 nats",
)


def printed(comparison: TextComparison, **options) -> str:
    console = Console(file=io.StringIO(), width=200, **options)
    print_comparison_of_texts(comparison, console)
    return console.file.getvalue()


def test_both_outputs_have_the_same_numbers(tmp_path):
    page = Page(write_comparison_of_texts(COMPARISON, tmp_path / "out.html"))
    assert page.rows == ROWS and page.open == []
    text = printed(COMPARISON)
    for row in ROWS:
        assert any(re.split(r"\s{2,}", line.strip()) == row for line in text.splitlines()), row
    for note in NOTES:
        assert note in page.text and note in text
    assert "a.jsonl:1" in page.text and "a.jsonl:1" in text


def test_the_file_needs_no_network_and_escapes_what_it_shows(tmp_path):
    source = write_comparison_of_texts(COMPARISON, tmp_path / "out.html").read_text("utf-8")
    assert "//" not in source and "<script" not in source and "&lt;b&gt;" in source and "<b>" not in source
    assert '<span class="up" style="--shade: 50%" title="1.00 full, 3.00 without es">' in source
    assert '<span class="down" style="--shade: 100%" title="6.00 full, 1.00 without es">c</span>' in source
    assert "prefers-color-scheme: dark" in source


def test_tokens_in_the_terminal_have_the_colours_of_the_page_and_faint_ones_none():
    text = passage_text(coloured_passage(PASSAGE))
    assert text.plain == "<b>␛[1mcd"
    styles = {
        text.plain[span.start : span.end]: span.style.bgcolor.get_truecolor().hex for span in text.spans if span.style
    }
    assert styles == {"␛[1m": "#e3a795", "c": "#2f66a9"}
    assert "\x1b[48;2;47;102;169m" in "".join(
        printed(COMPARISON, force_terminal=True, color_system="truecolor")
    ).replace("38;2;27;29;33;", "")
    assert "\x1b" not in printed(COMPARISON)


@pytest.mark.parametrize("shown", [[], [PASSAGE]])
def test_without_passages_no_colours_are_explained(shown, tmp_path):
    comparison = COMPARISON._replace(passages=shown, unpredicted=0)
    page = Page(write_comparison_of_texts(comparison, tmp_path / "out.html"))
    assert ("red: " in page.text, "Tokens" in page.text, "less than two" in page.text) == (
        bool(shown),
        bool(shown),
        False,
    )
