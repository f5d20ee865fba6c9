"""Compute ratios of a run to its baselines, by removed set and category, and which runs cannot be compared."""

from __future__ import annotations

import pytest
from evaluated_runs import evaluations, write_run

from sgtm.report.ratios import compute_ratios


def test_runs_are_compared_by_removal_and_category(tmp_path):
    baseline = write_run(tmp_path, "baseline", evaluations(10, 20, 40, 80, 100))
    run = write_run(tmp_path, "run", {50: evaluations(20)[20], 100: evaluations(40)[40]})
    ratios = compute_ratios(run, [baseline])
    assert {removal: set(by) for removal, by in ratios.items()} == {r: {"en", "es"} for r in ("full", "without es")}
    assert ratios["full"]["en"].value == pytest.approx(0.4) and ratios["without es"]["en"].value == pytest.approx(0.4)
    assert 0.2 < ratios["without es"]["es"].value < 0.3 and not ratios["without es"]["es"].extrapolated


def test_of_several_baselines_the_last_evaluations_count(tmp_path):
    shorter = [write_run(tmp_path, f"b{n}", evaluations(1, n), f"--train.steps={n}") for n in (20, 40, 80)]
    run = write_run(tmp_path, "run", evaluations(40))
    assert compute_ratios(run, shorter)["full"]["en"].value == pytest.approx(0.5)


def test_a_category_that_does_not_fall_has_no_ratio(tmp_path):
    """As the domain of a filtered run; where none falls there is nothing to compare."""
    lines = evaluations(10, 20, 40)
    for step, losses in lines.items():
        losses["full"]["es"] = 9.0 + step / 100
    baseline, run = write_run(tmp_path, "filtered", lines), write_run(tmp_path, "run", evaluations(20))
    assert {removal: set(by) for removal, by in compute_ratios(run, [baseline]).items()} == {
        "full": {"en"}, "without es": {"en"},
    }  # fmt: skip
    for losses in lines.values():
        losses["full"]["en"] = 3.0
    with pytest.raises(ValueError, match=r"^en: the baseline's loss does not fall"):
        compute_ratios(run, [write_run(tmp_path, "flat", lines)])


def test_what_cannot_be_compared_is_refused(tmp_path):
    run = write_run(tmp_path, "run", evaluations(40))
    cases = {
        "wider": (evaluations(10, 20, 40), "--model.intermediate_size=96", "model.intermediate_size is 64 and 96"),
        "sample": (evaluations(10, 20, 40), "--train.eval_sequences=9", "train.eval_sequences is 64 and 9"),
        "isolated": (evaluations(10, 20, 40), "--data.isolate_documents=true", "isolation of documents is False and "),
        "by-token": (evaluations(10, 20, 40), "--data.mixing=token", "isolation of documents is False and True"),
        "corpus": (evaluations(10, 20, 40), "--data.path=other", "corpus is synthetic and other"),
        "short": (evaluations(10, 20), "--train.seed=1", "^en: .* has 2; train it with --train.eval_every"),
        "blind": ({}, "--train.seed=1", "was not evaluated in training"),
    }
    for name, (lines, option, problem) in cases.items():
        other = write_run(tmp_path, name, lines, option)
        with pytest.raises(ValueError, match=problem):
            compute_ratios(run, [other])
