"""The result of a sweep: a row for each variant, mean and spread over the seeds of four losses; and its figures.

Losses are those of the evaluation after a run's last step (`train.eval_sequences` of each category of split test), in
nats per token. `retain` is the mean over the categories that no domain owns, `forget` over those of the domains, each
category counting the same; `full` is the model as trained, `ablated` the one without any domain.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sgtm.data.store import Corpus
from sgtm.files import replacing, write_atomically
from sgtm.masking.labels import FULL, removal_name
from sgtm.report.figures import DASHES, STYLE, WIDTH, Dashes
from sgtm.report.palette import DOMAINS, LIGHT, PAPER, RETAIN, UNLABELED
from sgtm.run.metrics import read_metrics
from sgtm.sweep.file import Run, Sweep
from sgtm.sweep.progress import final_losses

LOSSES = ("full_retain", "full_forget", "ablated_retain", "ablated_forget")


@dataclass(frozen=True)
class Row:
    """
    runs        of the variant, finished or not
    losses      the four losses of each finished run, by its name; NaN for one that was not finite or not measured
    categories  of each finished run: losses by condition and category, as the run has them
    """

    variant: str
    runs: tuple[Run, ...]
    losses: dict[str, dict[str, float]]
    categories: dict[str, dict[str, dict[str, float | None]]]

    @property
    def tokens(self) -> int:
        train = self.runs[0].config.train
        return train.steps * train.tokens_per_step

    def mean(self, loss: str) -> float | None:
        """None without a finished run."""
        values = self._values(loss)
        return statistics.fmean(values) if values else None

    def spread(self, loss: str) -> float | None:
        """Sample standard deviation over the seeds; None with fewer than two."""
        values = self._values(loss)
        return None if len(values) < 2 else math.nan if any(map(math.isnan, values)) else statistics.stdev(values)

    def _values(self, loss: str) -> list[float]:
        return [by_loss[loss] for by_loss in self.losses.values()]


def read_rows(sweep: Sweep, corpora: dict[str, Corpus | None]) -> list[Row]:
    """A row for each variant, in the order of the file."""
    rows = []
    for variant in sweep.variants:
        runs = tuple(run for run in sweep.runs if run.variant == variant)
        four: dict[str, dict[str, float]] = {}
        categories: dict[str, dict[str, dict[str, float | None]]] = {}
        for run in runs:
            losses, corpus = final_losses(run.directory, run.config), corpora[run.name]
            if losses and corpus:
                four[run.name], categories[run.name] = four_losses(losses, corpus.categories, run), losses
        rows.append(Row(variant, runs, four, categories))
    return rows


def four_losses(losses: dict, true_labels: dict[str, str], run: Run) -> dict[str, float]:
    """The four losses of one run; NaN where no category was measured or one is not finite."""
    forgotten = {category for category, label in true_labels.items() if label.startswith("forget:")}
    found = {}
    for model, condition in (("full", FULL), ("ablated", removal_name(run.config.space.domains))):
        by_category = losses[condition]
        for data in ("retain", "forget"):
            mine = [loss for name, loss in by_category.items() if (name in forgotten) == (data == "forget")]
            known = mine and all(loss is not None for loss in mine)
            found[f"{model}_{data}"] = statistics.fmean(mine) if known else math.nan
    return found


def write_table(sweep: Sweep, rows: list[Row]) -> None:
    """`table.csv` and `table.jsonl` in the sweep's folder; floats are written in full."""
    write_atomically(sweep.folder / "table.jsonl", "".join(json.dumps(_record(row)) + "\n" for row in rows))
    text = io.StringIO()
    spreads = [name for loss in LOSSES for name in (loss, f"{loss}_sd")]
    table = csv.DictWriter(text, ["variant", "finished", "runs", "tokens", *spreads], lineterminator="\n")
    table.writeheader()
    for row in rows:
        record = _record(row)
        flat = {key: record[key] for key in ("variant", "finished", "runs", "tokens")}
        table.writerow(flat | {name: record[name] for name in spreads})
    write_atomically(sweep.folder / "table.csv", text.getvalue())


def print_table(rows: list[Row], console: Console) -> None:
    """Losses as `mean ± spread`; a variant of which runs are missing shows how many there are."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="held-out loss, nats per token", title_justify="left")
    table.add_column("variant", overflow="fold")
    table.add_column("runs", justify="right", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    for loss in LOSSES:
        table.add_column(loss.replace("_", "\n"), justify="right")
    for row in rows:
        of = len(row.runs) if len(row.losses) == len(row.runs) else f"{len(row.losses)} of {len(row.runs)}"
        table.add_row(row.variant, str(of), f"{row.tokens:,}", *(_cell(row, loss) for loss in LOSSES))
    console.print(table)


def _cell(row: Row, loss: str) -> str:
    mean, spread = row.mean(loss), row.spread(loss)
    if mean is None:
        return "-"
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} ± {spread:.3f}"


def _record(row: Row) -> dict:
    statistic = {
        name: _json(value)
        for loss in LOSSES
        for name, value in ((loss, row.mean(loss)), (f"{loss}_sd", row.spread(loss)))
    }
    each = [
        {
            "run": run.name,
            "seed": run.seed,
            **{key: _json(value) for key, value in row.losses[run.name].items()},
            "losses": row.categories[run.name],
        }
        for run in row.runs
        if run.name in row.losses
    ]
    counts = {"finished": len(row.losses), "runs": len(row.runs), "tokens": row.tokens}
    return {"variant": row.variant, **counts, **statistic, "seeds": each}


def _json(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


COLOURS = [LIGHT[name] for name in (RETAIN, *(f"domain-{i}" for i in range(DOMAINS)), UNLABELED)]


def write_figures(sweep: Sweep, rows: list[Row]) -> None:
    """`training.png` and `losses.png` in `<folder>/figures`, each only where there is something to show."""
    folder = sweep.folder / "figures"
    folder.mkdir(exist_ok=True)
    for paint in (training, losses):
        file = folder / f"{paint.__name__}.png"
        with rc_context(STYLE):
            figure = paint(rows)
            if figure is None:
                file.unlink(missing_ok=True)
                continue
            with replacing(file) as out:
                figure.savefig(out, format="png", dpi=200)


def training(rows: list[Row]) -> Figure | None:
    """Training loss against tokens, a line for each variant: the mean over its finished seeds."""
    figure, axes = _panel("tokens", "training loss (nats per token)")
    for number, row in enumerate(rows):
        points = _curve(row)
        if points:
            axes.plot(*zip(*points, strict=True), color=_colour(number), linestyle=_dashes(number), label=row.variant)
    return _finished(figure, axes) if axes.lines else None


def losses(rows: list[Row]) -> Figure | None:
    """Forget loss against retain loss: the full model (ring) and the ablated one (dot), with the spread over seeds."""
    figure, axes = _panel("retain loss (nats per token)", "forget loss (nats per token)")
    names = []
    for number, row in enumerate(rows):
        places = {model: place for model in ("full", "ablated") if (place := _place(row, model))}
        if len(places) < 2:
            continue
        colour = _colour(number)
        axes.plot(*zip(*places.values(), strict=True), color=colour, linestyle=_dashes(number), linewidth=0.8)
        for model, (retain, forget) in places.items():
            axes.errorbar(
                retain,
                forget,
                xerr=row.spread(f"{model}_retain") or 0.0,
                yerr=row.spread(f"{model}_forget") or 0.0,
                fmt="o",
                color=colour,
                markerfacecolor=LIGHT[PAPER] if model == "full" else colour,
                markersize=6,
                linewidth=1,
            )
        names.append((number, row.variant))
    if not names:
        return None
    handles = [Line2D([], [], color=_colour(n), linestyle=_dashes(n), marker="o", label=name) for n, name in names]
    return _finished(figure, axes, handles)


def _place(row: Row, model: str) -> tuple[float, float] | None:
    """(retain, forget) loss of a model; None where one was not measured or is not finite."""
    retain, forget = row.mean(f"{model}_retain"), row.mean(f"{model}_forget")
    if retain is None or forget is None or not (math.isfinite(retain) and math.isfinite(forget)):
        return None
    return retain, forget


def _curve(row: Row) -> list[tuple[int, float]]:
    """(tokens, mean loss) at the steps that all finished seeds have logged with a finite loss."""
    by_step: dict[int, list[float]] = {}
    for run in row.runs:
        if run.name in row.losses:
            for line in read_metrics(run.directory / "metrics.jsonl"):
                if line["kind"] == "step" and line["loss"] is not None:
                    by_step.setdefault(line["step"], []).append(line["loss"])
    size = row.runs[0].config.train.tokens_per_step
    return [(step * size, statistics.fmean(found)) for step, found in by_step.items() if len(found) == len(row.losses)]


def _panel(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(1.4 * WIDTH, WIDTH), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def _finished(figure: Figure, axes: Axes, handles: Sequence[Artist] = ()) -> Figure:
    figure.legend(
        handles=handles or axes.get_legend_handles_labels()[0], loc="outside upper left", ncols=3, handlelength=1.6
    )
    return figure


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _dashes(number: int) -> Dashes:
    return DASHES[number // len(COLOURS) % len(DASHES)]
