"""The figures of a sweep: losses over training, and what keeping costs against what forgetting gains."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sgtm.files import replacing
from sgtm.report.figures import DASHES, STYLE, WIDTH
from sgtm.report.legend import add_legend
from sgtm.report.palette import DOMAINS, LIGHT, PAPER, RETAIN, UNLABELED
from sgtm.run.metrics import read_metrics
from sgtm.sweep.file import Sweep
from sgtm.sweep.table import Row

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
    figure, axes = panel("tokens", "training loss (nats per token)")
    for number, row in enumerate(rows):
        points = _curve(row)
        if points:
            axes.plot(*zip(*points, strict=True), **line_of(number), label=row.variant)
    return with_legend(figure, axes) if axes.lines else None


def losses(rows: list[Row]) -> Figure | None:
    """Forget loss against retain loss: the full model (ring) and the ablated one (dot), with the spread over seeds; the
    full one alone where nothing is masked."""
    figure, axes = panel("retain loss (nats per token)", "forget loss (nats per token)")
    names = []
    for number, row in enumerate(rows):
        points = {model: point for model in ("full", "ablated") if (point := _point(row, model))}
        if "full" not in points or (row.masks and len(points) < 2):
            continue
        colour = colour_of(number)
        axes.plot(*zip(*points.values(), strict=True), **line_of(number), linewidth=0.8)
        for model, (retain, forget) in points.items():
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
    handles = [Line2D([], [], **line_of(n), marker="o", label=name) for n, name in names]
    return with_legend(figure, axes, handles)


def _point(row: Row, model: str) -> tuple[float, float] | None:
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
    return [
        (step * size, statistics.fmean(losses)) for step, losses in by_step.items() if len(losses) == len(row.losses)
    ]


def panel(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(1.4 * WIDTH, WIDTH), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def with_legend(figure: Figure, axes: Axes, handles: Sequence[Artist] = ()) -> Figure:
    shown = handles or axes.get_legend_handles_labels()[0]
    entries = {str(handle.get_label()): handle for handle in shown}
    add_legend(figure, entries, 3, loc="outside upper left", handlelength=1.6)
    return figure


def colour_of(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def line_of(number: int) -> dict[str, Any]:
    """Colour and dashes of a line; the same for the same number, another for each of the first 32."""
    return {"color": colour_of(number), "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}
