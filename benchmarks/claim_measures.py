"""What the claims of claims.py measure: for each a function from a study to a number for every seed.

Each raises LookupError where a variant or an attack that it takes is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from sgtm.evaluation.compute_ratio import LEAST, ComputeRatio, LearningCurve
from sgtm.sweep.study import Study, Variant, leakages

STEPS = 64
"""Of the attacks that are compared."""


def variant(study: Study, name: str) -> Variant:
    """Raises LookupError for one that the study lacks."""
    return next(filter(lambda each: each.name == name, study.variants), None) or _missing(name)


def _missing(name: str):
    raise LookupError(name)


def by_seed(study: Study, name: str) -> dict[int, dict]:
    return {seed["seed"]: seed for seed in variant(study, name).seeds}


def difference(first: tuple[str, str], second: tuple[str, str]) -> Callable[[Study], list[float]]:
    """Of two (variant, loss), for every seed that both have."""

    def measure(study: Study) -> list[float]:
        ours, theirs = by_seed(study, first[0]), by_seed(study, second[0])
        return [ours[seed][first[1]] - theirs[seed][second[1]] for seed in ours if seed in theirs]

    return measure


def gap(name: str, strict: str) -> Callable[[Study], list[float]]:
    """How far adjacent data are above retained data in the ablated model, minus the same of the filtered one. A model
    that is better on all text has no advantage here."""

    def measure(study: Study) -> list[float]:
        ours, theirs = by_seed(study, name), by_seed(study, strict)
        return [
            ours[seed]["ablated_adjacent"] - ours[seed]["ablated_retain"]
            - (theirs[seed]["full_adjacent"] - theirs[seed]["full_retain"])
            for seed in ours
            if seed in theirs
        ]  # fmt: skip

    return measure


def beyond_the_weak_filter(name: str, weak: str) -> Callable[[Study], list[float]]:
    """The ablated forget loss minus that of the weak filter at the same retain loss, on the line through the filter's
    evaluations in training; where it never was at so low a retain loss, at its last."""

    def measure(study: Study) -> list[float]:
        filters = by_seed(study, weak)
        differences = []
        for seed, ours in by_seed(study, name).items():
            line = sorted((e["full_retain"], e["full_forget"]) for e in filters[seed]["evaluations"])
            retain, forget = zip(*line, strict=True)
            differences.append(ours["ablated_forget"] - float(np.interp(ours["ablated_retain"], retain, forget)))
        return differences

    return measure


def leakage_of(name: str) -> Callable[[Study], list[float]]:
    def measure(study: Study) -> list[float]:
        seeds = variant(study, name).seeds
        alone = [replace(variant(study, name), seeds=(seed,)) for seed in seeds]
        others = [each for each in study.variants if not each.masks]
        ratios = [leakages([*others, each])[name].ratio for each in alone]
        return [ratio.mean for ratio in ratios if ratio]

    return measure


def reached(study: Study, name: str, loss: str, baseline: str) -> list[ComputeRatio]:
    """For every seed the share of the baseline's training at which it reaches the loss, by the last losses of the
    baseline at several lengths (`NAME-STEPS`; the mean over its seeds at each)."""
    whole = variant(study, baseline)
    lengths = [each for each in study.variants if each.name.removeprefix(f"{baseline}-").isdigit()]
    points = [whole, *(each for each in lengths if each.name.startswith(f"{baseline}-"))]
    if len(points) < LEAST:
        raise LookupError(f"{baseline} of {LEAST} lengths")
    means = [each.loss(f"full_{loss.partition('_')[2]}") for each in points]
    shares = [each.tokens / whole.tokens for each in points]
    curve = LearningCurve(shares, [mean.mean for mean in means if mean])
    ratios = [curve.ratio(value) for value in variant(study, name).values(loss)]
    return [replace(ratio, value=ratio.value * max(shares)) for ratio in ratios]


def penalty(name: str, loss: str, baseline: str) -> Callable[[Study], list[float]]:
    """1 - the compute ratio, in percent. The error of the baseline's curve is not in it."""
    return lambda study: [100 * (1 - ratio.value) for ratio in reached(study, name, loss, baseline)]


def beyond(name: str, loss: str, baseline: str) -> Callable[[Study], bool]:
    """Whether a seed's loss is outside the baseline's lengths."""
    return lambda study: any(ratio.extrapolated for ratio in reached(study, name, loss, baseline))


def attacked(first: str, second: str) -> Callable[[Study], list[float]]:
    """Lowest forget loss that any attack of up to 64 steps has reached, of the first minus of the second."""

    def losses(study: Study, name: str) -> dict[int, tuple[int, float]]:
        """By seed, the tokens of so many steps and the loss."""
        curves = _curves(study, name)
        return {seed: (curve[-1]["tokens"], min(point["forget"] for point in curve)) for seed, curve in curves.items()}

    def measure(study: Study) -> list[float]:
        ours, theirs = losses(study, first), losses(study, second)
        pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
        if any(one[0] != other[0] for one, other in pairs):
            raise LookupError(f"attacks of {first} and {second} on as many tokens")
        return [one[1] - other[1] for one, other in pairs]

    return measure


def change_with_size(names: Sequence[str]) -> Callable[[Study], list[float]]:
    """For every seed, the slope of the line through the leakages of these variants against the log10 of their
    parameters."""

    def measure(study: Study) -> list[float]:
        sizes = [np.log10(variant(study, name).parameters or _missing(name)) for name in names]
        by_size = [leakage_of(name)(study) for name in names]
        if len({len(ratios) for ratios in by_size}) > 1:
            raise LookupError(f"{names} with the same seeds")
        return [float(np.polyfit(sizes, ratios, 1)[0]) for ratios in zip(*by_size, strict=True)]

    return measure


def relearning(first: str, second: str, baseline: str = "unmasked") -> Callable[[Study], list[float]]:
    """log2 of how many times as many steps the worst attack on the first takes as that on the second, to the forget
    loss that the baseline has before any attack, on the same held-out text. What is not reached counts as STEPS for the
    first, which is too few; for the second it is an error."""

    def measure(study: Study) -> list[float]:
        curves = {name: _curves(study, name) for name in (first, second, baseline)}
        seeds = [seed for seed in curves[first] if seed in curves[second] and seed in curves[baseline]]
        ratios = []
        for seed in seeds:
            target = curves[baseline][seed][0]["forget"]
            ours, theirs = (steps_to(curves[name][seed], target) for name in (first, second))
            if theirs is None:
                raise LookupError(f"{second} within {STEPS} steps")
            ratios.append(math.log2((ours or STEPS) / theirs))
        return ratios

    return measure


def _curves(study: Study, name: str) -> dict[int, list[dict]]:
    rows = [row for row in study.tampered if row["tampered"] == name] or _missing(name)
    return {row["seed"]: [point for point in row["curve"] if point["step"] <= STEPS] for row in rows}


def steps_to(curve: list[dict], target: float) -> float | None:
    """Steps at which the loss first falls to the target, between two evaluations on a line in log(1 + steps), at least
    half a step; None where it does not fall so far."""
    for before, after in pairwise(curve):
        if before["forget"] <= target:
            return max(0.5, before["step"])
        if after["forget"] <= target:
            share = (before["forget"] - target) / (before["forget"] - after["forget"])
            low, high = math.log1p(before["step"]), math.log1p(after["step"])
            return max(0.5, math.expm1(low + share * (high - low)))
    return None


def examined(name: str, first: tuple[str, str], second: tuple[str, str]) -> Callable[[Study], list[float]]:
    """First minus second of two (number, model) of a variant's examinations, for every seed."""

    def measure(study: Study) -> list[float]:
        rows = [row["values"] for row in study.examined if row["examined"] == name] or _missing(name)
        return [values[first[0]][first[1]] - values[second[0]][second[1]] for values in rows]

    return measure
