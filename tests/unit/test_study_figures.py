"""The figures of a study show the rows."""

from __future__ import annotations

import numpy as np
import pytest
from studies import FORGET, loss_of, row, rows, two_sizes, write_rows

from sgtm.sweep.study import absorptions, leakages, read_study
from sgtm.sweep.study_figures import (
    ablated,
    absorbed,
    adjacent,
    front,
    full,
    leaked,
    residual,
    sizes,
    tampering,
    undiscovered,
)
from sgtm.sweep.table import LOSSES, SIX


@pytest.fixture
def study(tmp_path):
    return read_study(write_rows(tmp_path / "mine.jsonl", rows()))


def test_a_trade_off_leads_to_the_last_losses(study):
    axes = ablated(study).axes[0]
    lines = [
        line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "None" and len(line.get_xydata()) == 2
    ]
    assert [pytest.approx(3.3 * 1.5), pytest.approx(1.5 * (loss_of(0) + 1))] in [line[0] for line in lines]
    assert [pytest.approx(3.3), pytest.approx(loss_of(0) + 1)] in [line[1] for line in lines]
    x = [container.lines[0].get_xdata()[0] for container in full(study).axes[0].containers]
    assert x == pytest.approx([3.0] * 5 + [3.1] * 3)  # of masked models too the full one
    assert [text.get_text() for text in ablated(study).legends[0].get_texts()] == [v.name for v in study.variants]


def test_adjacent_losses_have_a_figure_of_their_own(study, tmp_path):
    assert adjacent(study) is None and study.losses == LOSSES
    lines = rows()
    for seed in (seed for line in lines[5:8] for seed in line["seeds"]):
        for losses in (seed, *seed["evaluations"]):
            losses |= {"full_adjacent": 2.0, "ablated_adjacent": 2.5}
    study = read_study(write_rows(tmp_path / "mine.jsonl", lines))
    axes = adjacent(study).axes[0]
    assert [container.lines[0].get_xdata()[0] for container in axes.containers] == [2.5] * 3
    assert axes.get_xlabel() == "adjacent loss (nats per token)" and study.losses == SIX


def test_the_standard_models_make_the_line_of_undiscovered_data(study):
    axes = undiscovered(study).axes[0]
    tokens = (0.0, 1e4, 3e4, 1e5, FORGET)
    assert axes.lines[0].get_xydata().tolist() == [[t, pytest.approx(loss_of(t))] for t in tokens]
    dots = [container.lines[0].get_xydata()[0].tolist() for container in axes.containers]
    assert dots[5] == [1e5, pytest.approx(loss_of(0) + 1)] and dots[7] == [0.0, pytest.approx(loss_of(1e4))]
    assert undiscovered(study._replace(variants=study.variants[:5])) is None


def test_baselines_of_other_lengths_are_not_on_the_line_of_undiscovered_data(tmp_path):
    longer = rows()[0] | {"variant": "standard-long", "trained": {"retain": {"retain": 3e6}, "forget:es": {}}}
    study = read_study(write_rows(tmp_path / "mine.jsonl", [*rows(), longer]))
    assert len(undiscovered(study).axes[0].lines[0].get_xydata()) == 5


def test_no_two_models_look_alike(tmp_path):
    lines = [row(f"variant-{number}", (3.0, 4.0 + number, 3.5, 8.0)) for number in range(20)]
    (axes,) = ablated(read_study(write_rows(tmp_path / "mine.jsonl", lines))).axes
    dots = [container.lines[0] for container in axes.containers]
    assert len({(dot.get_color(), dot.get_marker()) for dot in dots}) == 20


def test_bars_are_leakages_and_the_largest_residual_norms(study):
    by_name = leakages(study.variants)
    assert [bar.get_width() for bar in leaked(study).axes[0].patches] == [
        by_name[name].ratio.mean for name in ("safe", "ignored")
    ]
    assert [bar.get_width() for bar in residual(study).axes[0].patches] == [11.0] * 8


def test_absorption_over_training(study):
    by_name = absorptions(study.variants)
    (axes,) = absorbed(study).axes
    lines = {container.get_label(): container.lines[0].get_xydata().tolist() for container in axes.containers}
    assert list(lines) == ["safe", "ignored", "complete"]
    assert lines["safe"] == [[share, value.mean] for share, value in by_name["safe"]]
    assert absorbed(study._replace(variants=study.variants[1:])) is None


def test_the_front_has_the_masked_variants_that_none_beats(tmp_path, study):
    losses = {"cheap": (3.0, 6.0), "good": (3.1, 8.0), "beaten": (3.2, 7.0), "safest": (3.3, 9.0)}
    lines = [row(name, (retain, 5.0, retain, forget)) for name, (retain, forget) in losses.items()]
    lines.append(row("filter", (2.9, 9.5, 2.9, 9.5), masks=False))
    (axes,) = front(read_study(write_rows(tmp_path / "mine.jsonl", lines))).axes
    best = np.array([losses[name] for name in ("cheap", "good", "safest")])
    assert axes.lines[0].get_xydata() == pytest.approx(best)
    dots = [container.lines[0].get_xydata()[0].tolist() for container in axes.containers]
    assert dots == [pytest.approx(pair) for pair in (*losses.values(), (2.9, 9.5))]
    assert front(study._replace(variants=study.variants[:3])) is None


def test_leakage_against_size(tmp_path, study):
    assert sizes(study) is None  # all have one
    both = read_study(write_rows(tmp_path / "both.jsonl", two_sizes()))
    points = [container.lines[0].get_xydata().tolist()[0] for container in sizes(both).axes[0].containers]
    ratios = [leakages(both.variants)[name].ratio.mean for name in ("safe", "ignored", "large-safe", "large-ignored")]
    assert points == [[size, ratio] for size, ratio in zip([1e6, 1e6, 4e6, 4e6], ratios, strict=True)]


def test_a_tamper_curve_for_each_seed_and_a_name_for_each_variant(study):
    figure = tampering(study)
    lines = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert lines == [[[0, 8], [1, 7], [2, 6]], [[0, 7], [1, 6], [2, 5]]]
    assert len({line.get_color() for line in figure.axes[0].lines}) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["paper (without es)"]
    assert tampering(study._replace(tampered=())) is None
    more = {**study.tampered[0], "tampered": "other", "attacks": {"one": [], "two": []}}
    figure = tampering(study._replace(tampered=(*study.tampered, more)))
    expected = ["paper (without es, 1 attack)", "other (without es, 2 attacks)"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == expected
