"""The figures of a study's page. None where its rows do not have what a figure shows."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sgtm.report.figures import WIDTH
from sgtm.report.palette import GRID, LIGHT, MUTED, PAPER
from sgtm.sweep.figures import COLOURS, colour_of, line_of, panel, with_legend
from sgtm.sweep.study import Interval, Study, Variant, absorptions, leakages, standard_points
from sgtm.words import counted

MARKERS = "osD^"
"""Of a dot: another for each of the first models with one colour."""


def ablated(study: Study) -> Figure | None:
    """Forget loss against retain loss over training, of the models that are served without the domains."""
    return _trade_off(study, [(variant, variant.served) for variant in study.variants])


def adjacent(study: Study) -> Figure | None:
    """Of these models, forget loss against the loss on categories close to a domain."""
    return _trade_off(study, [(variant, variant.served) for variant in study.variants], "adjacent")


def full(study: Study) -> Figure | None:
    """The same of the full models."""
    return _trade_off(study, [(variant, "full") for variant in study.variants])


def undiscovered(study: Study) -> Figure | None:
    """Forget loss of the served model against the forget tokens that retain weights were trained on."""
    points = [
        (number, variant, variant.undiscovered, loss)
        for number, variant in enumerate(study.variants)
        if variant.undiscovered is not None and (loss := variant.loss(f"{variant.served}_forget"))
    ]
    standard = standard_points(study.variants)
    if not standard or all(not variant.masks for _, variant, _, _ in points):
        return None
    figure, axes = panel("forget tokens that trained retain weights", "forget loss (nats per token)")
    axes.plot(*zip(*standard, strict=True), color=LIGHT[MUTED], linewidth=0.8, zorder=1)
    for number, variant, tokens, loss in points:
        _dot(axes, number, (Interval(tokens, None), loss), variant.name, filled=variant.masks)
    smallest = min((tokens for tokens, _ in standard if tokens), default=1.0)
    axes.set_xscale("symlog", linthresh=smallest)
    return with_legend(figure, axes)


def leaked(study: Study) -> Figure | None:
    """Leakage of every variant that has undiscovered forget tokens."""
    by_name = leakages(study.variants)
    ratios = [by_name[variant.name].ratio if variant.name in by_name else None for variant in study.variants]
    bars = [
        (number, variant.name, ratio.mean, ratio.half)
        for number, (variant, ratio) in enumerate(zip(study.variants, ratios, strict=True))
        if ratio
    ]
    return _bars(bars, "leakage")


def absorbed(study: Study) -> Figure | None:
    """Absorption of every masked variant over its training."""
    by_name = absorptions(study.variants)
    if not by_name:
        return None
    figure, axes = panel("share of the training", "absorption")
    for number, variant in enumerate(study.variants):
        if points := by_name.get(variant.name):
            shares, values = zip(*points, strict=True)
            means, halves = [value.mean for value in values], [value.half or 0.0 for value in values]
            axes.errorbar(shares, means, yerr=halves, **line_of(number), marker="o", markersize=4, label=variant.name)
    axes.set_ylim(bottom=0)
    return with_legend(figure, axes)


def front(study: Study) -> Figure | None:
    """What removal costs: ablated forget loss against the retain loss of the full model, with the line through the
    masked variants that no other masked one beats in both."""
    points = [
        (number, variant, cost, removal)
        for number, variant in enumerate(study.variants)
        if (cost := variant.loss("full_retain")) and (removal := variant.loss(f"{variant.served}_forget"))
    ]
    masked = sorted((cost.mean, removal.mean) for _, variant, cost, removal in points if variant.masks)
    best = [point for n, point in enumerate(masked) if all(other[1] < point[1] for other in masked[:n])]
    if not best:
        return None
    figure, axes = panel("retain loss of the full model (nats per token)", "forget loss (nats per token)")
    axes.plot(*zip(*best, strict=True), color=LIGHT[MUTED], linewidth=0.8, drawstyle="steps-post", zorder=1)
    for number, variant, cost, removal in points:
        _dot(axes, number, (cost, removal), variant.name, filled=variant.masks)
    return with_legend(figure, axes)


def sizes(study: Study) -> Figure | None:
    """Leakage against the parameters of the model; None where all have one size."""
    by_name = leakages(study.variants)
    shown = [
        (number, variant, ratio)
        for number, variant in enumerate(study.variants)
        if variant.parameters and variant.name in by_name and (ratio := by_name[variant.name].ratio)
    ]
    if len({variant.shape for _, variant, _ in shown}) < 2:
        return None
    figure, axes = panel("parameters", "leakage")
    for number, variant, ratio in shown:
        _dot(axes, number, (Interval(float(variant.parameters or 0), None), ratio), variant.name, filled=True)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    return with_legend(figure, axes)


def residual(study: Study) -> Figure | None:
    """Norm of the residual stream after the last layer, the largest of any label, mean over the seeds."""
    bars = []
    for number, variant in enumerate(study.variants):
        largest = [max(seed["residual"].values()) for seed in variant.seeds if seed.get("residual")]
        if largest:
            bars.append((number, variant.name, sum(largest) / len(largest), None))
    return _bars(bars, "norm of the residual stream")


def tampering(study: Study) -> Figure | None:
    """Worst-case forget loss against the steps of an attack: a line for each seed. Where not all went through as many
    attacks, the legend has their number."""
    if not study.tampered:
        return None
    figure, axes = panel("steps of fine-tuning", "lowest forget loss (nats per token)")
    variants = [variant.name for variant in study.variants]
    names = list(dict.fromkeys((row["tampered"], row["condition"]) for row in study.tampered))
    others = [name for name in names if name[0] not in variants]
    named: set[tuple[str, str]] = set()
    unequal = len({len(row["attacks"]) for row in study.tampered}) > 1
    for row in study.tampered:
        name = row["tampered"], row["condition"]
        number = len(variants) + others.index(name) if name in others else variants.index(name[0])
        points = [(point["step"], point["forget"]) for point in row["curve"]]
        attacks = f", {counted(len(row['attacks']), 'attack')}" * unequal
        label = None if name in named else f"{row['tampered']} ({row['condition']}{attacks})"
        named.add(name)
        axes.plot(*zip(*points, strict=True), **line_of(number), label=label, marker=".")
    axes.set_xscale("symlog", linthresh=1)
    return with_legend(figure, axes)


def _trade_off(study: Study, models: list[tuple[Variant, str]], data: str = "retain") -> Figure | None:
    """A line through the evaluations of each model, and its last losses with their intervals. The axes are for these:
    of the lines they show the end."""
    figure, axes = panel(f"{data} loss (nats per token)", "forget loss (nats per token)")
    last = []
    for number, (variant, model) in enumerate(models):
        other, forget = variant.loss(f"{model}_{data}"), variant.loss(f"{model}_forget")
        if other is None or forget is None:
            continue
        points = [(x.mean, y.mean) for _, x, y in variant.curve(model, data)]
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), **line_of(number), linewidth=0.9)
        _dot(axes, number, (other, forget), variant.name, filled=variant.masks)
        last.append((other.mean, forget.mean))
    if not last:
        return None
    axes.set(xlim=_limits([x for x, _ in last]), ylim=_limits([y for _, y in last]))
    return with_legend(figure, axes)


def _limits(losses: list[float]) -> tuple[float, float]:
    """Of an axis that shows these losses, and more room above them, from where the lines come."""
    room = max(0.25 * (max(losses) - min(losses)), 0.1)
    return min(losses) - room, max(losses) + 2 * room


def _dot(axes: Axes, number: int, point: tuple[Interval, Interval], name: str, filled: bool) -> None:
    """Filled: of a masked model; a ring: of one that was trained without masks."""
    x, y = point
    marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
    axes.errorbar(
        x.mean,
        y.mean,
        xerr=x.half or 0.0,
        yerr=y.half or 0.0,
        fmt=marker,
        color=colour_of(number),
        markerfacecolor=colour_of(number) if filled else LIGHT[PAPER],
        markersize=6,
        linewidth=1,
        label=name,
        zorder=2,
    )


def _bars(bars: Sequence[tuple[int, str, float, float | None]], xlabel: str) -> Figure | None:
    """(number of the variant, name, value, half of its interval) of each bar; None without one."""
    if not bars:
        return None
    figure = Figure(figsize=(WIDTH, 0.75 + 0.26 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for y, (number, _, value, half) in enumerate(bars):
        axes.barh(
            y, value, 0.62, color=colour_of(number), xerr=half, error_kw={"elinewidth": 1, "ecolor": LIGHT[MUTED]}
        )
    axes.set_yticks(range(len(bars)), [name for _, name, _, _ in bars])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=LIGHT[GRID])
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel)
    axes.set_xlim(left=0)
    return figure
