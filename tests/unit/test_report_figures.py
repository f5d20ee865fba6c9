"""The figures of a report: what each draws, and that it is None where a run has nothing for it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from pages import Page, write_run

from sgtm.masking.partition import LayerPartition
from sgtm.report import figures, write_report
from sgtm.report.figures import draw
from sgtm.report.page import EXHIBITS
from sgtm.report.palette import LIGHT, MUTED
from sgtm.report.record import RunRecord, read_record


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def test_residual_norms_are_drawn_by_label_and_layer(run):
    page = write_report(run).read_text()
    figure = page[page.index('<figure id="residual_norms">') :].split("</figure>")[0]
    for text in ("retain", "forget:fr", "after layer 1", "after layer 2", "after layer 3", ">100<"):
        assert text in figure
    old = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"step"' in line]
    (run / "metrics.jsonl").write_text("".join(json.dumps({**json.loads(line), "norms": {}}) + "\n" for line in old))
    assert "No norms of the residual stream" in Page(write_report(run)).text


def empty(tmp_path: Path) -> RunRecord:
    return RunRecord(tmp_path, None, "", [], [], {}, [])


@pytest.mark.parametrize("paint", [paint for paint, *_ in EXHIBITS], ids=lambda paint: paint.__name__)
def test_nothing_is_drawn_of_nothing(tmp_path, paint):
    assert paint(empty(tmp_path)) is None and draw("name", empty(tmp_path), paint) is None


def test_an_inlined_figure_has_ids_of_its_own_and_no_colour_of_its_own(run):
    drawing = draw("speed", read_record(run), figures.speed)
    assert drawing.name == "speed" and drawing.png.startswith(b"\x89PNG\r\n")
    assert drawing.svg.startswith('<svg viewBox="') and 'aria-labelledby="speed-caption"' in drawing.svg
    assert all(name.startswith("speed-") for name in re.findall(r'\bid="([^"]*)"', drawing.svg))
    assert LIGHT[MUTED] not in drawing.svg and f"var(--{MUTED})" in drawing.svg
    assert draw("speed", read_record(run), figures.speed) == drawing, "the same figure is the same bytes"


def test_many_points_have_a_running_mean_over_the_raw_values(tmp_path):
    steps = [{"step": n, "grad_norm": float(n % 2)} for n in range(100)]
    raw, mean = figures.speed(replace(empty(tmp_path), steps=steps)).axes[0].lines
    assert raw.get_ydata().tolist() == [float(n % 2) for n in range(100)]
    assert mean.get_xdata().tolist() == [float(n) for n in range(1, 100)] and set(mean.get_ydata()) == {0.5}
    (line,) = figures.speed(replace(empty(tmp_path), steps=steps[:79])).axes[0].lines
    assert len(line.get_xdata()) == 79


def test_groups_are_shown_at_their_original_heads_and_neurons():
    layer = LayerPartition((2, 1), (2, 1), (3, 2), head_order=(0, 2, 1), neuron_order=(0, 3, 4, 1, 2))
    assert figures._spans(layer, "heads") == {0: [(0, 1), (2, 1)], 1: [(1, 1)]}
    assert figures._spans(layer, "neurons") == {0: [(0, 1), (3, 2)], 1: [(1, 2)]}
