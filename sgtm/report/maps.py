"""A figure of many domains: a map of colours in the place of a mark for each loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sgtm.masking.labels import FORGET
from sgtm.report.findings import SetRow
from sgtm.report.palette import GRID, INK, LIGHT, RETAIN

FEW = 8  # rows of a map whose names are as large as other text
CELL = 0.16  # inches
WIDTH = 4.6
UP, DOWN = LIGHT["domain-0"], LIGHT[RETAIN]


def change_map(rows: Sequence[SetRow]) -> Figure | None:
    """Change of the loss by condition (row) and true label (column): red up, blue down, framed where meant to rise.

    Shades are shares of the largest change, in size. None without a condition besides the full model.
    """
    labels, rows = [*rows[0].losses], rows[1:]
    changes = [abs(change) for row in rows for change in row.changes.values() if math.isfinite(change)]
    if not changes:
        return None
    largest = max(changes) or 1.0
    figure = Figure(figsize=(WIDTH, 1.2 + CELL * len(rows)), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(rows):
        for j, label in enumerate(labels):
            change = row.changes.get(label, math.nan)
            share = min(1.0, abs(change) / largest) if math.isfinite(change) else 0.0
            colour = UP if change > 0 else DOWN, share
            edge, line = (LIGHT[INK], 1.0) if label in row.meant else (LIGHT[GRID], 0.4)
            cell = Rectangle((j + 0.03, i + 0.05), 0.94, 0.9, facecolor=colour, edgecolor=edge, linewidth=line)
            axes.add_patch(cell)
    axes.set(xlim=(0, len(labels)), ylim=(len(rows), 0), xlabel=f"data of; darkest: {largest:.2f} nats per token")
    size = 9 if len(rows) <= FEW else 6 if len(rows) <= 30 else 4.5
    names = [label.removeprefix(FORGET) for label in labels]
    axes.set_xticks([j + 0.5 for j in range(len(labels))], names, rotation=90, fontsize=size, color=LIGHT[INK])
    axes.set_yticks([i + 0.5 for i in range(len(rows))], [row.name for row in rows], fontsize=size, color=LIGHT[INK])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    return figure
