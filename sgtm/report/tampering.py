"""Worst-case tamper curves as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from string import ascii_lowercase
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sgtm.evaluation.tampering import Attack, Difference, Reached, difference, relearned
from sgtm.report.findings import error_of, signed
from sgtm.words import counted


class Curve(NamedTuple):
    """The worst case of a run's attacks (`worst_case`).

    name       of the run
    condition  what it is attacked without, as in `summary.json`
    worst      by evaluated step
    """

    name: str
    condition: str
    worst: dict[int, Reached]


def print_tampering(
    curve: Curve, control: Curve | None = None, target: tuple[str, float] | None = None, console: Console | None = None
) -> None:
    """Print the worst case at every evaluated step, beside that of a control, and when each reaches a loss.

    target  its name and value, in nats
    """
    console = console or Console()
    console.print(
        f"[bold]{curve.name}[/] ({curve.condition}): lowest held-out forget loss of all attacks, nats per token",
        highlight=False,
        soft_wrap=True,
    )
    letters = _letters([curve.worst.values(), control.worst.values() if control else ()])
    others = control.worst if control else {}
    differences = {step: difference(reached, others[step]) for step, reached in curve.worst.items() if step in others}
    console.print(_table(curve, control, differences, letters), "")
    for attack, letter in letters.items():
        console.print(f"{letter}: {attack}", highlight=False, markup=False)
    console.print("±: standard error over documents; seeds of the training are not in it", highlight=False)
    if control:
        how = "paired by document"
        if not all(each.paired for each in differences.values()):
            how += " where both rows have losses by document, else as of independent samples; --again adds them"
        console.print(
            f"difference: from {control.name} ({control.condition}) under the same attacks, ± {how}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    if target:
        for each in filter(None, (curve, control)):
            console.print(_reaches(each, *target), highlight=False, markup=False)


def _letters(curves: Iterable[Iterable[Reached]]) -> dict[Attack, str]:
    """A letter for every attack that is the worst at some step, after `z` pairs of letters."""
    attacks = dict.fromkeys(reached.attack for curve in curves for reached in curve if reached.step)
    names = [*ascii_lowercase, *(a + b for a in ascii_lowercase for b in ascii_lowercase)]
    return dict(zip(attacks, names, strict=False))


def _table(
    curve: Curve, control: Curve | None, differences: dict[int, Difference], letters: dict[Attack, str]
) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("steps", "tokens", "forget", "by", "retain"):
        table.add_column(heading, justify="left" if heading == "by" else "right")
    if control:
        for heading in (control.name, "by", "difference"):
            table.add_column(heading, justify="left" if heading == "by" else "right")
    for step, reached in curve.worst.items():
        cells = [
            f"{step:,}",
            f"{step * reached.attack.tokens:,}",
            _with_error(f"{reached.loss:.3f}", reached.error),
            _by(reached, letters),
            "-" if reached.retain is None else f"{reached.retain:.3f}",
        ]
        if control:
            other = control.worst.get(step)
            if other is None:
                cells += ["-", "", "-"]
            else:
                value, error, _ = differences[step]
                cells += [
                    _with_error(f"{other.loss:.3f}", other.error),
                    _by(other, letters),
                    _with_error(signed(value, 3), error),
                ]
        table.add_row(*cells)
    return table


def _with_error(value: str, error: float | None) -> str:
    return value if error is None else f"{value}±{error_of(error)}"


def _by(reached: Reached, letters: dict[Attack, str]) -> str:
    return letters[reached.attack] if reached.step else "none"


def _reaches(curve: Curve, name: str, loss: float) -> str:
    step, who = relearned(curve.worst, loss), f"{curve.name} ({curve.condition})"
    if step is None:
        return f"{who} does not reach {name}, {loss:.3f}, within {counted(max(curve.worst), 'step')}"
    before = next((earlier for earlier, later in pairwise(curve.worst) if later == step), None)
    since = "without an attack" if before is None else f"by step {step:,} (not by step {before:,})"
    return f"{who} reaches {name}, {loss:.3f}, {since}"
