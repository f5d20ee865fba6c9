"""Figures of many domains: a cell for each change, legends of a bounded length."""

from __future__ import annotations

import math

import pytest
from many_domains import summary
from matplotlib.colors import to_rgba

from sgtm.report.findings import set_rows
from sgtm.report.maps import DOWN, UP, change_map


def test_cells_are_changes_by_set_and_label():
    of = summary(5)
    of["losses"]["without d1"]["d2"] -= 0.25
    of["losses"]["without d2"]["d1"] = None
    rows = set_rows(of)
    (axes,) = change_map(rows).axes
    cells = {(round(p.get_x()), round(p.get_y())): p for p in axes.patches}
    assert len(cells) == len(axes.patches) == 6 * 6  # five domains and all; retain and five domains
    # By row: without d1, d2, ... ; by column: retain, d1, d2, ...
    assert cells[1, 0].get_facecolor() == pytest.approx(to_rgba(UP, 0.1 / 0.5))
    assert cells[5, 4].get_facecolor() == pytest.approx(to_rgba(UP, 1.0))
    assert cells[2, 0].get_facecolor() == pytest.approx(to_rgba(DOWN, 0.23 / 0.5))
    assert cells[1, 1].get_facecolor()[3] == 0
    framed = {corner for corner, cell in cells.items() if cell.get_linewidth() == 1.0}
    assert framed == {(k, k - 1) for k in range(1, 6)} | {(k, 5) for k in range(1, 6)}
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.name for row in rows[1:]]


def test_nothing_to_show():
    of = summary(4)
    for condition in list(of["losses"])[1:]:
        of["losses"][condition] = dict.fromkeys(of["losses"]["full"], math.nan)
    assert change_map(set_rows(of)) is None
