"""The losses of a run as tables for the terminal."""

from __future__ import annotations

from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sgtm.masking.labels import FORGET, FULL, lowered_domains
from sgtm.report.beside import RunComparison
from sgtm.report.findings import (
    LossRow,
    SetRow,
    cautions,
    conditions,
    error_of,
    loss_rows,
    measured_tokens,
    set_rows,
    signed,
)
from sgtm.report.ratios import Ratios, categories_of
from sgtm.report.record import is_forgotten

LARGE = 0.1  # nats: what a removal may cost the categories it is not meant for


def print_summary(summary: dict, console: Console | None = None) -> None:
    """Print the losses of a `summary.json`, a table for each removal: a row per category, nats per token. Of more than
    three removals one table: a row for each, a column for retained data and for each domain's data, or where the
    console is not as wide for the removed and the other domains.

    Of the full model and of the difference with their standard errors over documents. A difference that is meant (a
    removed domain's loss rising) is green; any other above 0.1 nat is red; a small test set is dim. Below them, what to
    beware of, the tokens of each category, the norm of the residual stream, and the categories of
    which there was nothing to measure.
    """
    console = console or Console()
    steps, all_steps = summary.get("steps"), summary.get("of_steps")
    partly = f" at step {steps} of {all_steps}" if steps != all_steps and all_steps else ""
    console.print(f"[bold]{summary.get('name', 'run')}[/]: held-out loss{partly}, nats per token", highlight=False)
    rows, baselines = loss_rows(summary), summary.get("baselines") or {}
    shown: list[str | None] = [*conditions(summary)]
    if sets := set_rows(summary):
        console.print(_sets(sets, console.width) or _sets_in_short(sets), "")
        console.print(
            "full: loss; others: change to it. Losses by category: sgtm report, summary.json", highlight=False
        )
    for condition in [] if sets else shown or [None]:
        console.print(_table(rows, condition, baselines), "")
    if rows and not any(shown):
        console.print("nothing is removed from a model that was trained without masks", highlight=False)
    if any(row.errors for row in rows) and not sets:
        console.print("±: standard error over documents, seeds of the training not included", highlight=False)
    if baselines:
        console.print(f"{' and '.join(baselines)}: full models trained without masks", highlight=False)
    for caution in cautions(summary):
        console.print(caution.replace("`", ""), highlight=False, markup=False)
    if norms := summary.get("output_norms"):
        by_removal = [
            f"{name} " + ", ".join(f"{category} {parts['residual'][-1]:.3g}" for category, parts in by_category.items())
            for name, by_category in norms.items()
            if not sets or name == FULL
        ]
        console.print(f"residual stream after the last layer, mean norm: {'; '.join(by_removal)}", highlight=False)
    if summary.get("counts"):
        console.print("", _tokens(summary), sep="\n")
        unmeasured = [c for c in summary["true_labels"] if c not in summary["losses"]["full"]]
        if unmeasured:
            console.print(f"no loss of {', '.join(unmeasured)}: no documents to measure in split {summary['split']}")


def print_comparison(comparison: RunComparison, console: Console | None = None) -> None:
    """Print what the runs beside a run are, and the compute ratios to them."""
    console = console or Console()
    for note in comparison.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    for title, ratios in comparison.ratios.items():
        print_ratios(ratios, title, console)


def print_ratios(ratios: Ratios, title: str, console: Console | None = None) -> None:
    """Print compute ratios to the runs `title`, a row per category, a column per removed set."""
    table = plain_table()
    table.add_column(f"compute ratio to {title}")
    for condition in ratios:
        table.add_column(condition, justify="right")
    for category in categories_of(ratios):
        table.add_row(category, *(str(by_category.get(category, "-")) for by_category in ratios.values()))
    console = console or Console()
    console.print("", table, sep="\n")
    if any(ratio.extrapolated for by_category in ratios.values() for ratio in by_category.values()):
        console.print("* extrapolated: the loss is outside the baseline's evaluations; inf: its curve never reaches it")


def plain_table() -> Table:
    """Columns two blanks apart, so that losses with their errors and two baselines fit into eighty columns."""
    return Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)


def _tokens(summary: dict) -> Table:
    """Tokens of each category that the corpus has, and of the evaluated split those that were measured; `left out`
    where `data.upsample` 0 keeps a category from the training."""
    table = plain_table()
    table.add_column("tokens of")
    counts = dict(sorted(summary["counts"].items(), key=lambda item: item[0] != "train"))
    for split in counts:
        table.add_column(f"{split}, measured" if split == summary["split"] else split, justify="right")
    for category in summary["true_labels"]:
        numbers = [
            measured_tokens(summary, category)
            if split == summary["split"]
            else by_category.get(category, {"tokens": 0})["tokens"]
            for split, by_category in counts.items()
        ]
        cells = ["-" if tokens is None else f"{tokens:,}" for tokens in numbers]
        if category in summary.get("left_out", ()) and "train" in counts:
            cells[0] += ", left out"
        table.add_row(category, *cells)
    return table


def _table(rows: list[LossRow], condition: str | None, baselines: dict[str, dict[str, float]]) -> Table:
    table = plain_table()
    table.add_column("category")
    table.add_column("true label", style="dim")
    table.add_column("full", justify="right")
    if condition:
        table.add_column(condition, justify="right")
        table.add_column("difference", justify="right")
    for name in baselines:
        table.add_column(name, justify="right", style="dim")
    for row in rows:
        cells: list[str | Text] = [
            row.category,
            row.true_label,
            f"{row.losses['full']:.3f}{_error(row.errors.get('full'))}",
        ]
        if condition:
            measured = condition in row.losses
            cells += [f"{row.losses[condition]:.3f}", _difference(row, condition)] if measured else ["-", ""]
        cells += [f"{losses[row.category]:.3f}" if row.category in losses else "-" for losses in baselines.values()]
        table.add_row(*cells, style="dim" if row.small else None)
    return table


def _sets(rows: list[SetRow], width: int) -> Table | None:
    """A column for each true label; None where that is wider than `width` characters."""
    table = plain_table()
    table.add_column("set")
    labels = [*rows[0].losses]
    names = [label.removeprefix(FORGET) for label in labels]
    if max(len(row.name) for row in rows) + sum(1 + max(len(name), 6) for name in names) > width:
        return None
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.name, *(_cell(row, label) for label in labels))
    return table


def _sets_in_short(rows: list[SetRow]) -> Table:
    """Columns of means: over the domains that a set removes, over the others, and the one that changes most."""
    table = plain_table()
    retained = [label for label in rows[0].losses if not label.startswith(FORGET)]
    for column in ("set", "own", "other domains", "most of them", *retained):
        table.add_column(column, justify="left" if column == "set" else "right")
    for row in rows:
        values = row.losses if row.condition == FULL else row.changes
        own = [value for label, value in values.items() if label in row.meant]
        others = {k: v for k, v in values.items() if k.startswith(FORGET) and k not in row.meant}
        most = max(others, key=lambda label: abs(others[label]), default="")
        worst = f"{_number(row, others[most])} {most.removeprefix(FORGET)}" if most else ""
        means = [
            _coloured(row, fmean(of), meant) if of else "" for of, meant in ((own, True), (others.values(), False))
        ]
        table.add_row(row.name, *means, worst, *(_cell(row, label) for label in retained))
    return table


def _cell(row: SetRow, label: str) -> str | Text:
    values = row.losses if row.condition == FULL else row.changes
    return _coloured(row, values[label], label in row.meant) if label in values else "-"


def _coloured(row: SetRow, value: float, meant: bool) -> Text:
    """A loss of the full model, or the change to one as in the other tables."""
    wrong = row.condition != FULL and not meant and abs(value) > LARGE
    return Text(_number(row, value), style="green" if meant and value > 0 else "red" if wrong or meant else "")


def _number(row: SetRow, value: float) -> str:
    return f"{value:.2f}" if row.condition == FULL else signed(value, 2)


def _difference(row: LossRow, condition: str) -> Text:
    difference = row.difference(condition)
    if row.small:
        style = "dim"
    elif is_forgotten(row.true_label, lowered_domains(condition)) and difference > 0:
        style = "green"
    else:
        style = "" if abs(difference) <= LARGE else "red"
    return Text(signed(difference, 3) + _error(row.difference_errors.get(condition)), style=style)


def _error(error: float | None) -> str:
    """Without blanks, so that a row fits into eighty columns."""
    return "" if error is None else f"±{error_of(error)}"
