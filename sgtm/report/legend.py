"""Legends above a figure's axes: no wider than the figure, and of many entries only some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

ENTRIES = 8
ROOM = 0.88
"""Of the figure's width, for a legend that begins at the axes, right of the numbers of theirs."""


def add_legend(figure: Figure, entries: Mapping[str, Any], columns: int, axes: Axes | None = None, **options) -> None:
    """Add a legend in as many columns, up to `columns`, as there is room for.

    A wider one would make the layout take its width from the axes.

    entries  handles by name
    axes     that have it; None: the figure
    options  of matplotlib's `legend`
    """
    owner, renderer = axes or figure, FigureCanvasAgg(figure).get_renderer()
    for number in range(max(1, min(columns, len(entries))), 0, -1):
        legend = owner.legend(entries.values(), entries, ncols=number, **options)
        if number == 1 or legend.get_window_extent(renderer).width <= ROOM * figure.bbox.width:
            return
        legend.remove()


def short_legend(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Handles by name, at most `ENTRIES` of them: the first ones, how many more there are, and the last two."""
    names = list(entries)
    if len(names) <= ENTRIES:
        return dict(entries)
    first, last = names[: ENTRIES - 3], names[-2:]
    more = {f"and {len(names) - len(first) - len(last)} more": Line2D([], [], linestyle="none")}
    return {name: entries[name] for name in first} | more | {name: entries[name] for name in last}
