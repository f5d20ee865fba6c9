"""Compute ratios with known answers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from sgtm.config import load_config
from sgtm.config.load import save_config
from sgtm.evaluation.compute_ratio import LearningCurve
from sgtm.report import compare
from sgtm.report.ratios import compute_ratios

FLOOR, FACTOR, EXPONENT = 2.0, 40.0, 0.3
COMPUTE = np.geomspace(1e4, 1e7, 16)


def loss_at(compute):
    return FLOOR + FACTOR * np.asarray(compute) ** -EXPONENT


CURVE = LearningCurve(COMPUTE, loss_at(COMPUTE))


@pytest.mark.parametrize("share", [0.003, 0.05, 0.31, 0.77, 0.99])
def test_a_power_law_inside_its_range(share):
    found = CURVE.ratio(float(loss_at(share * 1e7)))
    assert found.value == pytest.approx(share, rel=0.01) and not found.extrapolated
    assert found.low <= share <= found.high


def test_the_baseline_is_at_1_and_its_evaluations_where_they_were_made():
    for compute, loss in zip(CURVE.compute, CURVE.losses, strict=True):
        found = CURVE.ratio(float(loss))
        assert found.value == pytest.approx(compute / 1e7, rel=1e-9) and not found.extrapolated


def test_the_exponent_is_found_and_outside_the_range_is_marked():
    assert CURVE.law == pytest.approx((FLOOR, FACTOR, EXPONENT), rel=0.01)
    for share in (1e-4, 1.3, 5.0):
        found = CURVE.ratio(float(loss_at(share * 1e7)))
        assert found.extrapolated and str(found).startswith(f"{found.value:.2f}*")
        assert found.value == pytest.approx(share, rel=0.03)
    assert CURVE.ratio(1.9).value == math.inf
    assert not CURVE.ratio(float(CURVE.losses[-1])).extrapolated


def test_beyond_its_end_the_curve_continues_from_there():
    """Where the last evaluation is below the law, as at the end of a cosine."""
    losses = loss_at(COMPUTE)
    losses[-1] -= 0.05
    found = LearningCurve(COMPUTE, losses).ratio(float(losses[-1]) - 1e-6)
    assert found.value == pytest.approx(1, rel=1e-3) and found.extrapolated


def test_a_spoiled_evaluation_changes_neither_law_nor_the_rest():
    losses = loss_at(COMPUTE)
    losses[9] += 0.4
    curve = LearningCurve(COMPUTE, losses)
    assert curve.law.exponent == pytest.approx(EXPONENT, rel=0.01)
    for share in (0.01, 0.8):
        assert curve.ratio(float(loss_at(share * 1e7))).value == pytest.approx(share, rel=0.01)


def test_noise_is_measured_and_bounds_hold():
    rng, compute, inside, errors = np.random.default_rng(0), np.geomspace(1e5, 1e7, 60), 0, []
    for _ in range(40):
        curve = LearningCurve(compute, loss_at(compute) + rng.normal(0, 0.01, 60))
        found = curve.ratio(float(loss_at(5e6)))
        inside += found.low <= 0.5 <= found.high
        errors.append(curve.error(float(loss_at(5e6))))
    assert np.mean(errors) == pytest.approx(0.01, rel=0.15)
    assert 24 <= inside <= 38, "one standard deviation, 68 % of the time, more where neighbours are averaged"


def test_a_baseline_that_rises_for_a_while_is_flat_there():
    curve = LearningCurve([1, 2, 3, 4, 5, 6], [5.0, 4.0, 3.0, 3.4, 3.2, 2.0])
    assert curve.falling == pytest.approx([5, 4, 3.2, 3.2, 3.2, 2.0])
    assert curve.ratio(3.2).value == pytest.approx(3 / 6)
    assert 5 / 6 < curve.ratio(3.1).value < 1
    assert curve.ratio(4.5).value == pytest.approx(2 ** (math.log(5 / 4.5) / math.log(5 / 4)) / 6)


def test_three_evaluations_have_no_error_and_any_order_will_do():
    found = LearningCurve([4, 1, 2], [2.0, 4.0, 3.0]).ratio(3.0)
    assert found.value == 0.5 and math.isnan(found.low) and str(found) == "0.50"


@pytest.mark.parametrize(
    ("compute", "losses", "problem"),
    [
        ([1, 2], [3.0, 2.0], "3 evaluations or more, the baseline has 2"),
        ([1, 2, 3], [3.0, math.nan, 2.0], "finite and above 0"),
        ([0, 2, 3], [3.0, 2.5, 2.0], "finite and above 0"),
        ([1, 2, 2], [3.0, 2.5, 2.0], "at the same compute"),
        ([1, 2, 3], [2.0, 2.5, 3.0], "does not fall"),
    ],
)
def test_what_is_no_learning_curve_is_refused(compute, losses, problem):
    with pytest.raises(ValueError, match=problem):
        LearningCurve(compute, losses)


def write_run(folder, name: str, evaluations: dict[int, dict], *options: str):
    """A run directory with these evaluations: {step: losses}."""
    run = folder / name
    run.mkdir()
    save_config(
        load_config("debug", [f"--runs={folder}", f"--name={name}", "--train.steps=100", *options]), run / "config.yaml"
    )
    lines = [{"kind": "eval", "step": step, "losses": losses} for step, losses in evaluations.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def evaluations(*steps: int, worse: float = 1.0) -> dict[int, dict]:
    full = {step: {"en": worse * (1 + 100 / step), "es": worse * (2 + 100 / step)} for step in steps}
    return {step: {"full": losses, "without es": {"en": losses["en"], "es": 6.0}} for step, losses in full.items()}


def test_runs_are_compared_by_removal_and_category(tmp_path):
    baseline = write_run(tmp_path, "baseline", evaluations(10, 20, 40, 80, 100))
    run = write_run(tmp_path, "run", {50: evaluations(20)[20], 100: evaluations(40)[40]})
    found = compute_ratios(run, [baseline])
    assert {removal: set(by) for removal, by in found.items()} == {r: {"en", "es"} for r in ("full", "without es")}
    assert found["full"]["en"].value == pytest.approx(0.4) and found["without es"]["en"].value == pytest.approx(0.4)
    assert 0.2 < found["without es"]["es"].value < 0.3 and not found["without es"]["es"].extrapolated


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


NONE, FILTERED = "--masking.strategy=none", "--data.upsample={es: 0}"


def test_unmasked_and_filtered_runs_beside_a_run(tmp_path):
    """A curve for each kind of training; runs of one kind make one by their lengths."""
    run = write_run(tmp_path, "run", evaluations(40))
    unmasked = write_run(tmp_path, "unmasked", evaluations(10, 20, 40, 100), NONE)
    lengths = [
        write_run(tmp_path, f"f{n}", evaluations(1, n), NONE, FILTERED, f"--train.steps={n}") for n in (20, 40, 80)
    ]
    found = compare(run, [unmasked, *lengths])
    assert found.losses == {
        "unmasked": {"en": 2.0, "es": 3.0}, "f20": {"en": 6.0, "es": 7.0}, "f40": {"en": 3.5, "es": 4.5},
        "f80": {"en": 2.25, "es": 3.25},
    }  # fmt: skip
    assert list(found.ratios) == ["unmasked", "f20, f40, f80"] and found.notes[0].startswith(
        "unmasked: trained without m"
    )
    assert found.ratios["unmasked"]["full"]["en"].value == pytest.approx(0.4)
    assert found.ratios["f20, f40, f80"]["full"]["en"].value == pytest.approx(0.5)
    assert found.notes[1] == f"f20: trained without masks, es left out, {20 * 512:,} tokens."


def test_a_run_without_a_curve_stands_beside_another_all_the_same(tmp_path):
    run = write_run(tmp_path, "run", evaluations(40))
    found = compare(run, [write_run(tmp_path, "short", evaluations(50), NONE)])
    assert found.losses == {"short": {"en": 3.0, "es": 4.0}} and not found.ratios
    about, no_ratio = found.notes
    assert about == f"short: trained without masks, {50 * 512:,} tokens, at step 50 of 100."
    few = "a learning curve needs 3 evaluations or more, the baseline has 1"
    assert no_ratio == f"No compute ratio to short: en: {few}; train it with --train.eval_every."


def test_losses_beside_a_run_are_of_the_same_evaluation(tmp_path):
    """`sgtm eval` has measured other sequences than the evaluation in training."""
    run, other = (write_run(tmp_path, name, evaluations(40, 100)) for name in ("run", "other"))
    summary = {"losses": {"full": {"en": 1.5}}, "steps": 100, "of_steps": 100, "split": "test", "sequences": None}
    summary |= {"errors": {"full": {"en": 0.25}}}
    cases = [
        ([], 2.0, ""),
        ([other], 2.0, ""),
        ([run], 2.0, f"other sequences than the run; for the same ones: sgtm eval {other}"),
        ([run, other], 1.5, ""),
    ]
    for evaluated, loss, note in cases:
        for folder in (run, other):
            (folder / "summary.json").unlink(missing_ok=True)
        for folder in evaluated:
            (folder / "summary.json").write_text(json.dumps(summary))
        found = compare(run, [other])
        assert (found.losses["other"]["en"], found.errors["other"] == {"en": 0.25}) == (loss, loss == 1.5)
        assert (note in found.notes[0]) and ("other sequences" in found.notes[0]) == bool(note)
    (other / "summary.json").write_text(json.dumps({**summary, "sequences": 8}))
    assert "other sequences than the run (--split, --sequences)" in compare(run, [other]).notes[0]
    measured = {"en": {"documents": 3, "tokens": 99}}  # of a small test split, all of it either way
    (other / "summary.json").unlink()
    (run / "summary.json").write_text(json.dumps({**summary, "measured": measured}))
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line | {"measured": measured}) + "\n" for line in lines))
    found = compare(run, [other])
    assert found.losses["other"]["en"] == 2.0 and "other sequences" not in found.notes[0]


def test_two_runs_of_one_name_are_told_apart_by_their_place(tmp_path):
    run = write_run(tmp_path, "run", evaluations(40))
    others = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        others.append(write_run(tmp_path / place, "same", evaluations(40), f"--data.path={tmp_path}"))
    save_config(
        load_config("debug", ["--name=run", "--train.steps=100", f"--data.path={tmp_path}"]), run / "config.yaml"
    )
    assert list(compare(run, others).losses) == list(map(str, others))


def test_what_cannot_be_compared_is_refused(tmp_path):
    run = write_run(tmp_path, "run", evaluations(40))
    cases = {
        "wider": (evaluations(10, 20, 40), "--model.intermediate_size=96", "model.intermediate_size is 64 and 96"),
        "sample": (evaluations(10, 20, 40), "--train.eval_sequences=9", "train.eval_sequences is 64 and 9"),
        "isolated": (evaluations(10, 20, 40), "--data.isolate_documents=true", "isolation of documents is False and "),
        "by-token": (evaluations(10, 20, 40), "--data.mixing=token", "isolation of documents is False and True"),
        "corpus": (evaluations(10, 20, 40), "--data.path=other", "corpus is synthetic and other"),
        "short": (evaluations(10, 20), "--train.seed=1", "^en: .* has 2; train it with --train.eval_every"),
        "blind": ({}, "--train.seed=1", "was not evaluated"),
    }
    for name, (lines, option, problem) in cases.items():
        other = write_run(tmp_path, name, lines, option)
        with pytest.raises(ValueError, match=problem):
            compute_ratios(run, [other])
        if name != "short":
            with pytest.raises(ValueError, match=problem):
                compare(run, [other])
    same = write_run(tmp_path, "same", evaluations(10, 20, 40))
    for others in ([run], [same, same]):
        with pytest.raises(ValueError, match=rf"--baseline {others[-1]} is the run itself, or is given twice"):
            compare(run, others)
