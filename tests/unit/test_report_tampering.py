"""Tamper curves in the terminal: a known table, beside a control, and the step by which a loss is reached."""

from __future__ import annotations

import io

from rich.console import Console

from sgtm.evaluation.tampering import Attack, Documents, Reached, worst_case
from sgtm.report.tampering import Curve, print_tampering

SLOW = Attack("forget+retain", (("es",), ("en",)), 5e-4, "cosine", 4, 0, 65536, (0, 1, 2, 4))
FAST = Attack("forget", (("es",),), 2e-3, "constant", 4, 0, 65536, (0, 1, 2, 4))


def curve(name: str, condition: str, *losses: tuple[Attack, int, float]) -> Curve:
    """Of two documents with one target each: the loss is theirs minus and plus a quarter of it."""
    return Curve(
        name,
        condition,
        worst_case(
            Reached(a, step, loss, 0.0123, 2.5, Documents((loss * 3 / 4, loss * 5 / 4), (1, 1)))
            for a, step, loss in losses
        ),
    )


MINE = curve("mine", "without es", (SLOW, 0, 6.0), (FAST, 1, 4.5), (FAST, 2, 4.75), (SLOW, 4, 3.25))
FILTERED = curve("filtered", "full", (SLOW, 0, 6.25), (FAST, 1, 4.5), (FAST, 2, 4.25), (SLOW, 4, 3.5))


def printed(*curves: Curve, **options) -> list[str]:
    console = Console(width=80, record=True, file=io.StringIO())
    print_tampering(*curves, console=console, **options)
    return [" ".join(line.split()) for line in console.export_text().splitlines() if line.strip("─ ")]


def test_the_table_is_the_worst_case_by_step():
    assert printed(MINE) == [
        "mine (without es): lowest held-out forget loss of all attacks, nats per token",
        "steps tokens forget by retain",
        "0 0 6.000±0.012 none 2.500",
        "1 65,536 4.500±0.012 a 2.500",
        "2 131,072 4.500±0.012 a 2.500",
        "4 262,144 3.250±0.012 b 2.500",
        "a: forget, constant, lr 0.002, warm-up 0",
        "b: forget+retain, cosine over 4, lr 0.0005",
        "±: standard error over documents; seeds of the training are not in it",
    ]


def test_the_control_stands_beside_with_the_difference():
    lines = printed(MINE, FILTERED)
    assert lines[1:6] == [
        "steps tokens forget by retain filtered by difference",
        "0 0 6.000±0.012 none 2.500 6.250±0.012 none −0.250±0.062",
        "1 65,536 4.500±0.012 a 2.500 4.500±0.012 a +0.000±0.000",
        "2 131,072 4.500±0.012 a 2.500 4.250±0.012 a +0.250±0.062",
        "4 262,144 3.250±0.012 b 2.500 3.500±0.012 b −0.250±0.062",
    ]
    assert lines[-1] == "difference: from filtered (full) under the same attacks, ± paired by document"


def test_a_difference_that_is_not_paired_is_described():
    worst = {step: reached._replace(documents=None) for step, reached in FILTERED.worst.items()}
    lines = printed(MINE, FILTERED._replace(worst=worst))
    assert lines[2] == "0 0 6.000±0.012 none 2.500 6.250±0.012 none −0.250±0.017"
    assert lines[-1] == (
        "difference: from filtered (full) under the same attacks, ± paired by document where both rows have losses by "
        "document, else as of independent samples; --again adds them"
    )


def test_when_a_loss_is_reached():
    lines = printed(MINE, FILTERED, target=("the target loss", 3.3))
    assert lines[-2:] == [
        "mine (without es) reaches the target loss, 3.300, by step 4 (not by step 2)",
        "filtered (full) does not reach the target loss, 3.300, within 4 steps",
    ]
    assert printed(MINE, target=("it", 7.0))[-1] == "mine (without es) reaches it, 7.000, without an attack"


def test_what_was_not_measured_is_a_dash():
    short = curve("short", "full", (SLOW, 0, 6.0))
    lines = printed(Curve("mine", "full", {0: Reached(FAST, 0, 5.0), 1: Reached(FAST, 1, 4.0)}), short)
    assert lines[2:4] == ["0 0 5.000 none - 6.000±0.012 none −1.000", "1 65,536 4.000 a - - -"]
