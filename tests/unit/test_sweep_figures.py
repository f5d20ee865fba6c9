"""The figures of a sweep: means over finished seeds, and no figure where nothing is measured."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from sweeps import step, sweep_of, write_run

from sgtm.sweep.figures import losses, training, write_figures
from sgtm.sweep.table import LOSSES, Row


@pytest.fixture
def sweep(tmp_path: Path):
    return sweep_of(tmp_path, "variants: {a: , b: }\nseeds: [0, 1, 2]")


def row_of(sweep, variant: str, *four: tuple[float, ...]) -> Row:
    """A row of this variant; so many of its runs are finished, with these four losses."""
    runs = tuple(run for run in sweep.runs if run.variant == variant)
    by_run = {run.name: dict(zip(LOSSES, values, strict=True)) for run, values in zip(runs, four, strict=False)}
    return Row(variant, runs, by_run, {})


def test_training_shows_the_mean_at_steps_that_all_finished_seeds_have(sweep):
    row = row_of(sweep, "a", (1, 2, 3, 4), (1, 2, 3, 4))
    for run, values in zip(row.runs, ({1: 4.0, 2: 3.0, 3: 2.0}, {1: 6.0, 2: None, 3: 4.0}, {3: 99.0}), strict=True):
        write_run(run, *(step(number, loss) for number, loss in values.items()))
    (line,) = training([row, row_of(sweep, "b")]).axes[0].lines
    assert (line.get_label(), line.get_xydata().tolist()) == ("a", [[512, 5.0], [1536, 3.0]])
    assert training([row_of(sweep, "b")]) is None


def test_losses_lead_from_the_full_model_to_the_ablated_one(sweep):
    a = row_of(sweep, "a", (1.0, 2.0, 1.5, 6.0), (3.0, 4.0, 2.5, 8.0))
    b = row_of(sweep, "b", (1.0, 2.0, math.nan, 6.0))
    figure = losses([a, b])
    line = figure.axes[0].lines[0]
    assert line.get_xydata().tolist() == [[2.0, 3.0], [2.0, 7.0]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a"]
    assert losses([b]) is None and losses([row_of(sweep, "a")]) is None


def test_a_figure_of_before_does_not_outlive_its_data(sweep):
    folder = sweep.folder / "figures"
    folder.mkdir(parents=True)
    (folder / "training.png").write_bytes(b"of before")
    write_figures(sweep, [row_of(sweep, "a", (1.0, 2.0, 1.5, 6.0))])
    assert [file.name for file in folder.iterdir()] == ["losses.png"]
    assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG\r\n")
