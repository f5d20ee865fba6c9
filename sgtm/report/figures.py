"""The figures of a report, each drawn once and given as a PNG (light) and as an SVG that follows the page's colours.

A figure whose data a run does not have is None; the page then names what is missing. Sizes suit a phone: one column of
4.6 inches, text of 9 points.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sgtm.masking.labels import lowered_domains, removal_name, removed_domains
from sgtm.masking.partition import LayerPartition
from sgtm.report.findings import conditions, error_of, loss_rows, set_rows, signed
from sgtm.report.legend import ENTRIES, add_legend, short_legend
from sgtm.report.maps import change_map
from sgtm.report.palette import GRID, INK, LIGHT, MUTED, PAPER, RETAIN, of_label, of_removal, themed
from sgtm.report.record import RunRecord, is_forgotten

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

WIDTH = 4.6  # inches
Shown = TypeVar("Shown")  # what a figure is of
Dashes = Literal["-", "--", ":", "-."]
DASHES: tuple[Dashes, ...] = ("-", "--", ":", "-.")
STYLE: dict[RcKeyType, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "sgtm",
    "text.color": LIGHT[INK],
    "axes.edgecolor": LIGHT[MUTED],
    "axes.labelcolor": LIGHT[MUTED],
    "axes.facecolor": "none",
    "axes.linewidth": 0.6,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LIGHT[GRID],
    "grid.linewidth": 0.6,
    "xtick.color": LIGHT[MUTED],
    "ytick.color": LIGHT[MUTED],
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": LIGHT[PAPER],
    "savefig.facecolor": LIGHT[PAPER],
    "lines.linewidth": 1.5,
}


@dataclass(frozen=True)
class Drawing:
    name: str
    png: bytes
    svg: str


def draw(name: str, record: Shown, paint: Callable[[Shown], Figure | None]) -> Drawing | None:
    """The figure as PNG bytes and as an `<svg>` element to inline; None where `paint` has nothing to show."""
    with rc_context(STYLE):
        figure = paint(record)
        if figure is None:
            return None
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=200)
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return Drawing(name, png.getvalue(), _inline(svg.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    """A bare `<svg>` element: no prologue, no links, ids of its own, colours of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub(
        r'<svg[^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-labelledby="{name}-caption">', svg
    )
    return themed(re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 var(--sans)", svg))


def loss_curves(record: RunRecord) -> Figure | None:
    """Training loss of each applied label against the optimizer step."""
    labels = {key.removeprefix("loss/") for line in record.steps for key in line if key.startswith("loss/")}
    if not labels:
        return None
    figure, axes = _panel(2.9)
    for label in sorted(labels, key=lambda name: (len(labels) > ENTRIES and name.startswith("forget:"), name)):
        points = [
            (line["step"], line[f"loss/{label}"]) for line in record.steps if line.get(f"loss/{label}") is not None
        ]
        _curve(axes, points, LIGHT[of_label(label, _domains(record))], label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    _legend(figure, axes, ENTRIES)
    return figure


def evaluations(record: RunRecord) -> Figure | None:
    """Held-out loss of each category while training: full (solid) and with domains removed (dashed), each by itself; of
    many domains the category's own."""
    if len(record.evals) < 2:
        return None
    figure, axes = _panel(2.9)
    true = record.summary.get("true_labels", {})
    shown = ["full", *(key for key in record.evals[-1]["losses"] if len(removed_domains(key)) == 1)]
    many = len(shown) > len(DASHES)
    for category in record.evals[-1]["losses"]["full"]:
        own = ["full", removal_name([true.get(category, "").removeprefix("forget:")])] if many else shown
        for dashes, condition in zip(DASHES, own, strict=False):
            points = [
                (line["step"], line["losses"][condition][category])
                for line in record.evals
                if category in line["losses"].get(condition, {})
            ]
            colour = LIGHT[of_label(true.get(category, category), _domains(record))]
            if points:
                axes.plot(*zip(*points, strict=True), dashes, color=colour)
        axes.plot([], [], color=colour, label=category)
    for dashes, condition in zip(DASHES, ["full", "without its domain"] if many else shown, strict=False):
        axes.plot([], [], dashes, color=LIGHT[INK], label=condition)
    axes.set(xlabel="optimizer step", ylabel="held-out loss (nats per token)")
    _legend(figure, axes, 4)
    return figure


def residual_norms(record: RunRecord) -> Figure | None:
    """Mean norm of the residual stream by applied label (colour), after the first, a middle and the last layer."""
    lines = [line for line in record.steps if line.get("norms")]
    if not lines:
        return None
    labels = sorted({label for line in lines for label in line["norms"]})
    last = len(next(iter(lines[0]["norms"].values()))["residual"]) - 1
    layers = sorted({1, (last + 1) // 2, last}, reverse=True)
    figure, axes = _panel(2.9)
    for label in labels:
        colour = LIGHT[of_label(label, _domains(record))]
        for dashes, layer in zip(DASHES, layers, strict=False):
            points = [(line["step"], line["norms"].get(label, {"residual": {}})["residual"]) for line in lines]
            points = [(step, norms[layer]) for step, norms in points if norms and norms[layer]]
            if points:
                axes.plot(*zip(*points, strict=True), dashes if len(points) > 1 else "o", color=colour)
        axes.plot([], [], color=colour, label=label)
    for dashes, layer in zip(DASHES, layers, strict=False):
        axes.plot([], [], dashes, color=LIGHT[INK], label=f"after layer {layer}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axes.get_ylim()
    axes.set_ylim(low, high if high / low > 10 else 10 * low)  # a label on the axis at the least
    axes.set(xlabel="optimizer step", ylabel="norm of the residual stream")
    _legend(figure, axes, 3)
    return figure


def ablation(record: RunRecord) -> Figure | None:
    """Held-out loss of each category: the full model (ring) and the model without a domain (dot)."""
    rows, removals = loss_rows(record.summary), conditions(record.summary)
    if not rows or not removals:
        return None
    if sets := set_rows(record.summary):
        return change_map(sets)
    bars = [(row, condition) for row in rows for condition in removals if condition in row.losses]
    figure, axes = _panel(0.75 + 0.3 * len(bars) + 0.12 * len(rows))
    y, ticks = 0.0, []
    for row in rows:
        mine = [condition for shown, condition in bars if shown is row]
        ticks.append((y + (len(mine) - 1) / 2, row.category))
        for condition in mine:
            full, without = row.losses["full"], row.losses[condition]
            colour = LIGHT[of_removal(lowered_domains(condition), _domains(record))]
            ink, faint = LIGHT[MUTED if row.small else INK], 0.4 if row.small else 1.0
            error = row.difference_errors.get(condition)
            text = signed(row.difference(condition), 3) + ("" if error is None else f" ± {error_of(error)}")
            axes.plot([full, without], [y, y], color=colour, linewidth=2, solid_capstyle="butt", zorder=2, alpha=faint)
            axes.plot(without, y, "o", color=colour, markersize=6, zorder=3, alpha=faint)
            axes.plot(full, y, "o", color=ink, markerfacecolor=LIGHT[PAPER], markersize=6, zorder=4)
            weight = "bold" if is_forgotten(row.true_label, lowered_domains(condition)) else "normal"
            axes.annotate(
                f"{text} {condition}",
                (max(full, without), y),
                (8, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                fontweight=weight,
                color=ink,
            )
            y += 1
        y += 0.4
    axes.set_yticks(*zip(*ticks, strict=True), color=LIGHT[INK])
    axes.set_ylim(y - 0.8, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_xlabel("held-out loss (nats per token)")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.65 * (high - low))  # room for the words at the right
    return figure


def gradient_norms(record: RunRecord) -> Figure | None:
    """Gradient norm of each group, relative to its weights' norm, by the true label of the data."""
    norms = record.summary.get("gradient_norms")
    if not norms:
        return None
    groups = list(dict.fromkeys(group for by_group in norms.values() for group in by_group))
    values = np.array([[float(by_group.get(group, math.nan)) for group in groups] for by_group in norms.values()])
    few = len(groups) <= ENTRIES
    figure, axes = _panel(0.75 + (0.42 if few else 0.16) * len(norms))
    largest = np.nanmax(values)
    for (i, j), value in np.ndenumerate(values):
        share = value / largest if largest > 0 and value > 0 else 0.0
        strength = 0.0 if share == 0 else 0.12 + 0.88 * max(0.0, 1 + math.log10(share) / 4)  # four decades
        cell = Rectangle((j + 0.03, i + 0.05), 0.94, 0.9, facecolor=LIGHT[RETAIN], alpha=strength, edgecolor="none")
        axes.add_patch(cell)
        axes.add_patch(Rectangle((j + 0.03, i + 0.05), 0.94, 0.9, fill=False, edgecolor=LIGHT[GRID], linewidth=0.6))
        text = "–" if math.isnan(value) else "0" if value == 0 else f"{value:.2g}"
        if groups[j] == list(norms)[i].removeprefix("forget:"):  # the label's own group
            axes.add_patch(Rectangle((j + 0.03, i + 0.05), 0.94, 0.9, fill=False, edgecolor=LIGHT[INK], linewidth=1.6))
        if few:
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=LIGHT[PAPER if strength > 0.75 else INK])
    axes.set(xlim=(0, len(groups)), ylim=(len(norms), 0), xlabel="group", ylabel="true label")
    size = 9 if few else 5
    axes.set_xticks(np.arange(len(groups)) + 0.5, groups, color=LIGHT[INK], rotation=0 if few else 90, fontsize=size)
    axes.set_yticks(np.arange(len(norms)) + 0.5, list(norms), color=LIGHT[INK], fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    return figure


def partition(record: RunRecord) -> Figure | None:
    """Heads and neurons of every layer at their original indices, coloured by group."""
    if record.config is None:
        return None
    layers, groups = record.config.partition.layers, record.config.partition.groups
    figure = Figure(figsize=(WIDTH, 1.5 + 2 * 0.17 * len(layers)), layout="constrained")
    for axes, unit in zip(figure.subplots(2, 1), ("heads", "neurons"), strict=True):
        for i, layer in enumerate(layers):
            for group, spans in sorted(_spans(layer, unit).items()):
                name = groups[group] if len(layer.heads) > 1 else "no groups"
                colour, strength = LIGHT[of_label(name, groups[1:])], 1.0 if group else 0.45
                axes.broken_barh(spans, (i - 0.4, 0.8), facecolor=colour, alpha=strength, label=name, linewidth=0)
        total = sum(getattr(layers[0], unit))
        axes.set(
            xlim=(0, total), ylim=(len(layers) - 0.4, -0.6), ylabel="layer", xlabel=f"{unit[:-1]} (original index)"
        )
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        if unit == "heads":
            axes.vlines(range(1, total), -0.5, len(layers) - 0.5, color=LIGHT[PAPER], linewidth=0.8)
            shown = range(0, total, max(1, total // 8))
            axes.set_xticks([head + 0.5 for head in shown], [str(head) for head in shown])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    unique = {
        name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    add_legend(figure, short_legend(unique), 4, loc="outside upper left", handlelength=1, handleheight=1)
    return figure


def speed(record: RunRecord) -> Figure | None:
    """Throughput and global gradient norm against the optimizer step."""
    panels = [("tokens_per_second", "tokens per second"), ("grad_norm", "gradient norm")]
    panels = [(key, label) for key, label in panels if any(line.get(key) is not None for line in record.steps)]
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH, 0.5 + 1.35 * len(panels)), layout="constrained")
    for axes, (key, label) in zip(
        figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels, strict=True
    ):
        points = [(line["step"], line[key]) for line in record.steps if line.get(key) is not None]
        _curve(axes, points, LIGHT[MUTED], label)
        axes.grid(True)
        axes.set(ylabel=label, ylim=(0, None))
    axes.set_xlabel("optimizer step")
    return figure


def _panel(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    return figure, axes


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, names = axes.get_legend_handles_labels()
    add_legend(
        figure,
        short_legend(dict(zip(names, handles, strict=True))),
        columns,
        axes,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        borderaxespad=0.2,
        handlelength=1.4,
    )


def _curve(axes: Axes, points: list[tuple[float, float]], colour: str, label: str) -> None:
    """A line; where there are many points, a running mean over the faint raw values."""
    x, y = np.array(points, dtype=float).T
    window = len(x) // 40
    if window > 1:
        axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
        sums = np.cumsum(np.insert(y, 0, 0.0))
        x, y = x[window - 1 :], (sums[window:] - sums[:-window]) / window
    axes.plot(x, y, "-" if len(x) > 1 else "o", color=colour, label=label)


def _domains(record: RunRecord) -> tuple[str, ...]:
    if record.config is not None:
        return record.config.space.domains
    named = {domain: None for key in conditions(record.summary) for domain in removed_domains(key)}
    return tuple(named)


def _spans(layer: LayerPartition, unit: str) -> dict[int, list[tuple[int, int]]]:
    """(start, length) stretches of original indices of each group."""
    order = layer.head_order if unit == "heads" else layer.neuron_order
    owners = [group for group, count in enumerate(getattr(layer, unit)) for _ in range(count)]
    spans: dict[int, list[tuple[int, int]]] = {}
    previous = None
    for index, group in sorted(zip(order, owners, strict=True)):
        mine = spans.setdefault(group, [])
        if group == previous:
            mine[-1] = (mine[-1][0], mine[-1][1] + 1)
        else:
            mine.append((index, 1))
        previous = group
    return spans
