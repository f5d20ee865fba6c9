"""Compute ratios with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sgtm.evaluation.compute_ratio import LearningCurve

FLOOR, FACTOR, EXPONENT = 2.0, 40.0, 0.3
COMPUTE = np.geomspace(1e4, 1e7, 16)


def loss_at(compute):
    return FLOOR + FACTOR * np.asarray(compute) ** -EXPONENT


CURVE = LearningCurve(COMPUTE, loss_at(COMPUTE))


@pytest.mark.parametrize("share", [0.003, 0.05, 0.31, 0.77, 0.99])
def test_a_power_law_inside_its_range(share):
    ratio = CURVE.ratio(float(loss_at(share * 1e7)))
    assert ratio.value == pytest.approx(share, rel=0.01) and not ratio.extrapolated
    assert ratio.low <= share <= ratio.high


def test_the_baseline_is_at_1_and_its_evaluations_where_they_were_made():
    for compute, loss in zip(CURVE.compute, CURVE.losses, strict=True):
        ratio = CURVE.ratio(float(loss))
        assert ratio.value == pytest.approx(compute / 1e7, rel=1e-9) and not ratio.extrapolated


def test_the_exponent_is_found_and_outside_the_range_is_marked():
    assert CURVE.law == pytest.approx((FLOOR, FACTOR, EXPONENT), rel=0.01)
    for share in (1e-4, 1.3, 5.0):
        ratio = CURVE.ratio(float(loss_at(share * 1e7)))
        assert ratio.extrapolated and str(ratio).startswith(f"{ratio.value:.2f}*")
        assert ratio.value == pytest.approx(share, rel=0.03)
    assert CURVE.ratio(1.9).value == math.inf
    assert not CURVE.ratio(float(CURVE.losses[-1])).extrapolated


def test_beyond_its_end_the_curve_continues_from_there():
    """Where the last evaluation is below the law, as at the end of a cosine."""
    losses = loss_at(COMPUTE)
    losses[-1] -= 0.05
    ratio = LearningCurve(COMPUTE, losses).ratio(float(losses[-1]) - 1e-6)
    assert ratio.value == pytest.approx(1, rel=1e-3) and ratio.extrapolated


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
        ratio = curve.ratio(float(loss_at(5e6)))
        inside += ratio.low <= 0.5 <= ratio.high
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
    ratio = LearningCurve([4, 1, 2], [2.0, 4.0, 3.0]).ratio(3.0)
    assert ratio.value == 0.5 and math.isnan(ratio.low) and str(ratio) == "0.50"


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
