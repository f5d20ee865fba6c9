"""Completions in the terminal: a column for each model, and nothing that a model has written controls the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sgtm.inference.decoding import Completion
from sgtm.report.completions import described_end, print_completions, printable


def printed(prompt: str, completions: dict[str, Completion], width: int = 60) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_completions(prompt, completions, console)
    return console.file.getvalue().splitlines()


def test_models_stand_side_by_side():
    lines = printed(
        "Once", {"full": Completion(" upon", [1, 2], "end"), "without [es]": Completion(" a", [3], "tokens")}
    )
    first, second = (line.index(word) for line, word in ((lines[0], "full"), (lines[0], "without [es]")))
    (row,) = (line for line in lines if "Once" in line)
    assert row[first:].startswith("Once upon ") and row[second:].rstrip() == "Once a"
    assert lines[-1][first:].startswith("2 tokens, end of text") and lines[-1][second:].rstrip() == "1 token"


def test_a_long_text_is_folded_and_line_ends_stay():
    text = "z" * 70 + "\ny"
    lines = printed("", {"full": Completion(text, [0] * 72, "context")}, width=30)
    assert sum(line.count("z") for line in lines) == 70 and any(line.strip() == "y" for line in lines)
    assert lines[-1].startswith("72 tokens, context full")
    assert max(map(len, lines)) <= 30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x1b[31mb\x07", "a␛[31mb␇"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x7f\x9b1m\x85", "��1m�"),
        ("a\rb", "a␍b"),
        ("ñ🍒", "ñ🍒"),
    ],
)
def test_control_characters_are_shown_and_not_obeyed(text, expected):
    assert printable(text) == expected
    (name, completion) = ("full", Completion(text, [1], "tokens"))
    assert "\x1b" not in "".join(printed(text, {name: completion}))


def test_why_a_completion_ended():
    ends = ("tokens", "end", "context")
    assert [described_end(Completion("", [1], end)) for end in ends] == [
        "1 token",
        "1 token, end of text",
        "1 token, context full",
    ]
