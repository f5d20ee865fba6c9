"""Legends of figures: sgtm/report/legend.py."""

from __future__ import annotations

import warnings

import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure

from sgtm.report.figures import STYLE, WIDTH
from sgtm.report.legend import ENTRIES, add_legend, short_legend


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["retain", "es"], 2),
        (["forget:bio", "forget:chem", "forget:es", "retain", "unlabeled"], 3),
        ([f"forget:domain-with-a-long-name-{i}" for i in range(8)], 1),
    ],
)
@pytest.mark.parametrize("outside", [True, False])
@rc_context(STYLE)
def test_a_legend_leaves_the_axes_their_width(names, columns, outside):
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    axes = figure.subplots()
    entries = {name: axes.plot([0, 1], [0, 1])[0] for name in names}
    if outside:
        add_legend(figure, entries, 8, loc="outside upper left")
    else:
        add_legend(figure, entries, 8, axes, loc="lower left", bbox_to_anchor=(0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where a layout fails
        figure.canvas.draw()
    (legend,) = [*figure.legends, *filter(None, [axes.get_legend()])]
    assert [text.get_text() for text in legend.get_texts()] == names
    assert legend._ncols == columns
    extent = legend.get_window_extent()
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.width
    assert axes.bbox.width > 0.8 * figure.bbox.width


def test_legends_end():
    few = {str(i): i for i in range(ENTRIES)}
    assert short_legend(few) == few
    many = {str(i): i for i in range(50)}
    shown = short_legend(many)
    assert list(shown) == ["0", "1", "2", "3", "4", "and 43 more", "48", "49"] and shown["49"] == 49
