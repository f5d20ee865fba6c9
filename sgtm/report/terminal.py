"""The losses of a run as tables for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sgtm.evaluate.compute_ratio import Ratios, categories_of
from sgtm.masking.labels import removed_domains
from sgtm.report.findings import LossRow, conditions, loss_rows, signed
from sgtm.report.record import is_forgotten

LARGE = 0.1  # nats: what a removal may cost the categories it is not meant for


def print_summary(summary: dict, console: Console | None = None) -> None:
    """Print the losses of a `summary.json`, a table for each removal: a row per category, nats per token.

    A difference that is meant (a removed domain's loss rising) is green; any other above 0.1 nat is red. Below them,
    how many tokens of each category the corpus has, the norm of the residual stream, and the categories of which there
    was nothing to measure.
    """
    console = console or Console()
    steps, all_steps = summary.get("steps"), summary.get("of_steps")
    partly = f" at step {steps} of {all_steps}" if steps != all_steps and all_steps else ""
    console.print(f"[bold]{summary.get('name', 'run')}[/]: held-out loss{partly}, nats per token", highlight=False)
    rows, baselines = loss_rows(summary), summary.get("baselines") or {}
    for condition in conditions(summary) or [None]:
        console.print(_table(rows, condition, baselines))
    if baselines:
        console.print(f"{' and '.join(baselines)}: full models trained without masks", highlight=False)
    if norms := summary.get("output_norms"):
        by_removal = [
            f"{name} " + ", ".join(f"{category} {parts['residual'][-1]:.3g}" for category, parts in by_category.items())
            for name, by_category in norms.items()
        ]
        console.print(f"residual stream after the last layer, mean norm: {'; '.join(by_removal)}", highlight=False)
    if summary.get("counts"):
        console.print(_tokens(summary))
        unmeasured = [c for c in summary["true_labels"] if c not in summary["losses"]["full"]]
        if unmeasured:
            console.print(f"no loss of {', '.join(unmeasured)}: no documents to measure in split {summary['split']}")


def print_ratios(ratios: Ratios, console: Console | None = None) -> None:
    """Print compute ratios, a row per category, a column per removed set."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("compute ratio")
    for condition in ratios:
        table.add_column(condition, justify="right")
    for category in categories_of(ratios):
        table.add_row(category, *(str(by_category.get(category, "-")) for by_category in ratios.values()))
    console = console or Console()
    console.print(table)
    if any(ratio.extrapolated for by_category in ratios.values() for ratio in by_category.values()):
        console.print("* extrapolated: the loss is outside the baseline's evaluations")


def _tokens(summary: dict) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("tokens of")
    for split in summary["counts"]:
        table.add_column(split, justify="right")
    for category in summary["true_labels"]:
        counts = [by.get(category, {"tokens": 0})["tokens"] for by in summary["counts"].values()]
        table.add_row(category, *(f"{tokens:,}" for tokens in counts))
    return table


def _table(rows: list[LossRow], condition: str | None, baselines: dict[str, dict[str, float]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("category")
    table.add_column("true label", style="dim")
    table.add_column("full", justify="right")
    if condition:
        table.add_column(condition, justify="right")
        table.add_column("difference", justify="right")
    for name in baselines:
        table.add_column(name, justify="right", style="dim")
    for row in rows:
        cells = [row.category, row.true_label, f"{row.losses['full']:.3f}"]
        if condition:
            measured = condition in row.losses
            cells += [f"{row.losses[condition]:.3f}", _difference(row, condition)] if measured else ["-", ""]
        cells += [f"{losses[row.category]:.3f}" if row.category in losses else "-" for losses in baselines.values()]
        table.add_row(*cells)
    return table


def _difference(row: LossRow, condition: str) -> Text:
    difference = row.difference(condition)
    if is_forgotten(row.true_label, removed_domains(condition)) and difference > 0:
        style = "green"
    else:
        style = "" if abs(difference) <= LARGE else "red"
    return Text(signed(difference, 3), style=style)
