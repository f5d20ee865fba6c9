"""What the claims of claims.py measure: for each a function from a study to a `Quantity`.

Each raises Missing where a variant, an attack or an examination that it takes is missing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from sgtm.evaluation.compute_ratio import LEAST, LearningCurve
from sgtm.sweep.study import Study, Variant, VariantLeakage, leakages, standard_curve, standard_models

STEPS, LONG = 64, 256
"""Of the attacks that are compared."""

SPILL = 0.25
"""Of what removal costs forgotten data beyond other text: what it may cost adjacent data (`spill`)."""

LINE_ERROR = 0.26
"""Nats, of `at_equal_retain` by evaluations: how far a model that was trained to its end lies from the line through
those of a longer training, at most, rounded up (tests/unit/test_claim_errors.py takes it from the committed rows)."""

CURVE_ERROR = 0.31
"""Of a leakage that is read from filtered models of one seed, as a share of it: half of the 95 % interval, by the
standard deviation over the seeds of the filtered models (tests/unit/test_claim_errors.py takes it from the committed
rows); read from the mean over n seeds, by sqrt(n) smaller."""

SAMPLE_ERROR = 0.008
"""Nats, of `at_equal_retain` where models were measured on different numbers of sequences: how far the forget loss on
600 sequences of each category of arXiv lies from the line through models that were measured on all, at most, rounded up
(tests/unit/test_claim_errors.py takes it from the committed rows)."""


class Missing(Exception):
    """The rows lack what a claim takes."""


class Quantity(NamedTuple):
    """
    values    a number for every seed
    outside   whether one of them is read beyond the ends of a curve
    at_least  whether one of them is a lower bound
    error     of the measure itself, which no seed shows
    """

    values: list[float]
    outside: bool = False
    at_least: bool = False
    error: float = 0.0


Measure = Callable[[Study], Quantity]


def variant(study: Study, name: str) -> Variant:
    """Raises Missing for one that the study lacks."""
    for each in study.variants:
        if each.name == name:
            return each
    raise Missing(name)


def by_seed(study: Study, name: str) -> dict[int, dict]:
    """Losses of a variant's seeds; nan of a run that has diverged, which rows have as null."""
    seeds = variant(study, name).seeds
    return {each["seed"]: {key: math.nan if value is None else value for key, value in each.items()} for each in seeds}


def difference(first: tuple[str, str], second: tuple[str, str]) -> Measure:
    """Of two (variant, loss), for every seed that both have."""

    def measure(study: Study) -> Quantity:
        ours, theirs = by_seed(study, first[0]), by_seed(study, second[0])
        return Quantity([ours[seed][first[1]] - theirs[seed][second[1]] for seed in ours if seed in theirs])

    return measure


def spill(name: str) -> Measure:
    """By how much more removal raises the loss on adjacent data than on retained data, minus `SPILL` of how much more
    it raises that on forgotten data: 0 where nothing is removed."""

    def measure(study: Study) -> Quantity:
        spilt = []
        for seed in variant(study, name).seeds:
            retain, adjacent, forget = (
                seed[f"ablated_{data}"] - seed[f"full_{data}"] for data in ("retain", "adjacent", "forget")
            )
            spilt.append(adjacent - retain - SPILL * (forget - retain))
        return Quantity(spilt)

    return measure


def at_equal_retain(name: str, other: str) -> Measure:
    """The ablated forget loss minus that of another variant's served model at the same retain loss, on the line through
    the other's final losses at several lengths (`NAME-STEPS`), or without these through its evaluations in training,
    with `LINE_ERROR`; beyond the ends of a line, at the nearest. Where the models were not all measured on the same
    number of sequences, with `SAMPLE_ERROR` too."""

    def measure(study: Study) -> Quantity:
        differences, beyond = [], False
        for ours, line in _lines(study, name, other):
            retain, forget = zip(*line, strict=True)
            differences.append(ours["ablated_forget"] - float(np.interp(ours["ablated_retain"], retain, forget)))
            beyond |= not retain[0] <= ours["ablated_retain"] <= retain[-1]
        both = by_seed(study, name).keys() & by_seed(study, other).keys()
        finished = all(_by_length(study, other, seed) for seed in both)
        models = [variant(study, name), *(lengths(study, other) if finished else [variant(study, other)])]
        samples = {each.settings.get("train.eval_sequences") for each in models}
        error = (0.0 if finished else LINE_ERROR) + (SAMPLE_ERROR if len(samples) > 1 else 0.0)
        return Quantity(differences, outside=beyond, error=error)

    return measure


def _lines(study: Study, name: str, other: str) -> list[tuple[dict, list[tuple[float, float]]]]:
    """For every seed that both have, ours and the other's (retain, forget), by rising retain loss."""
    served, others = variant(study, other).served, by_seed(study, other)
    lines = []
    for seed, ours in by_seed(study, name).items():
        if seed in others:
            points = _by_length(study, other, seed) or others[seed]["evaluations"]
            lines.append((ours, sorted((point[f"{served}_retain"], point[f"{served}_forget"]) for point in points)))
    return lines


def _by_length(study: Study, name: str, seed: int) -> list[dict] | None:
    """Final losses of a variant and of its other lengths, of a seed; None where fewer than three have it."""
    points = [by_seed(study, each.name) for each in lengths(study, name)]
    own = [each[seed] for each in points if seed in each]
    return own if len(own) >= LEAST else None


def lengths(study: Study, name: str) -> list[Variant]:
    """The variant, and those that are it at other lengths (`NAME-STEPS`)."""
    others = []
    for each in study.variants:
        steps = each.name.removeprefix(f"{name}-")
        # `filtered-undiscovered-3` has 3 % of the Spanish and not 3 steps.
        if steps.isdigit() and each.settings.get("train.steps", int(steps)) == int(steps):
            others.append(each)
    return [variant(study, name), *others]


def leakage_of(name: str) -> Measure:
    """The token equivalent of the ablated model's forget loss, over the undiscovered forget tokens."""
    return lambda study: Quantity([seed.ratio.mean for seed in _leakages(study, name).values() if seed.ratio])


def added_leakage(name: str, complete: str) -> Measure:
    """The token equivalent minus that of the variant with complete labels, over the undiscovered forget tokens."""

    def measure(study: Study) -> Quantity:
        ours, theirs = _leakages(study, name), _leakages(study, complete)
        undiscovered = variant(study, name).undiscovered or math.nan
        pairs = [(ours[seed].tokens.mean, theirs[seed].tokens.mean) for seed in ours if seed in theirs]
        return Quantity([(one - other) / undiscovered for one, other in pairs])

    return measure


def _leakages(study: Study, name: str) -> dict[int, VariantLeakage]:
    """By seed."""
    others, mine = [each for each in study.variants if not each.masks], variant(study, name)
    by_name = {seed["seed"]: leakages([*others, replace(mine, seeds=(seed,))]) for seed in mine.seeds}
    if not all(name in each for each in by_name.values()):
        raise Missing(f"a curve of filtered models for {name}")
    return {seed: each[name] for seed, each in by_name.items()}


def reached(study: Study, name: str, loss: str, baseline: str) -> list[tuple[float, bool]]:
    """For every seed that both have, the share of the baseline's training at which it reaches the loss, nan where a run
    has diverged, and whether that is extrapolated; by the last losses of the baseline of that seed at several lengths
    (`NAME-STEPS`). A length that lacks the seed has the loss of its others, moved by as much as the whole length's of
    this seed is from theirs."""
    whole, ours = variant(study, baseline), by_seed(study, name)
    points = lengths(study, baseline)
    if len(points) < LEAST:
        raise Missing(f"{baseline} of {LEAST} lengths")
    shares, end = [each.tokens / whole.tokens for each in points], f"full_{loss.partition('_')[2]}"
    wholes = {seed: losses[end] for seed, losses in by_seed(study, baseline).items()}
    shares_reached = []
    for seed in (seed for seed in ours if seed in wholes):
        losses = []
        for point in points:
            by_own = {other: theirs[end] for other, theirs in by_seed(study, point.name).items()}
            others = [theirs - wholes[other] for other, theirs in by_own.items() if other in wholes]
            if seed not in by_own and not others:
                raise Missing(f"{point.name} of a seed of {baseline}")
            losses.append(by_own[seed] if seed in by_own else wholes[seed] + statistics.fmean(others))
        diverged = not all(map(math.isfinite, (*losses, ours[seed][loss])))
        curve = None if diverged else LearningCurve(shares, losses)
        shares_reached.append(curve.reached(ours[seed][loss]) if curve else (math.nan, False))
    return shares_reached


def penalty(name: str, loss: str, baseline: str) -> Measure:
    """Percent of the baseline's training that the variant loses: 100 (1 - the share at which the baseline is there).
    Where even the shortest length of the baseline is better, that of this length, a lower bound. Outside: a seed's loss
    is none that the lengths reach."""

    def measure(study: Study) -> Quantity:
        least, shares = _shortest(study, baseline), reached(study, name, loss, baseline)
        return Quantity(
            [100 * (1 - max(share, least)) for share, _ in shares],
            outside=any(extrapolated for _, extrapolated in shares),
            at_least=any(share < least for share, _ in shares),
        )

    return measure


def _shortest(study: Study, baseline: str) -> float:
    """Share of the whole baseline's tokens that its shortest length has."""
    return min(each.tokens for each in lengths(study, baseline)) / variant(study, baseline).tokens


def attacked(first: str, second: str, steps: int | None = None) -> Measure:
    """Forget loss of the worst attack, of the first minus of the second, after so many steps; None: the mean over the
    numbers of steps that were evaluated, from 1 to STEPS."""

    def measure(study: Study) -> Quantity:
        differences = []
        for ours, theirs in _worst_cases(study, (first, second), STEPS).values():
            by_step = {step: ours[step] - theirs[step] for step in ours if step}
            if steps is not None and steps not in by_step:
                raise Missing(f"attacks of {steps} steps")
            differences.append(statistics.fmean(by_step.values()) if steps is None else by_step[steps])
        return Quantity(differences)

    return measure


def change_with_size(names: Sequence[str]) -> Measure:
    """For every seed, the slope of the line through the leakages of these variants against the log10 of their
    parameters. names: by rising size. Leakages are read from the means over the seeds of filtered models, which all
    seeds of a size share, with `CURVE_ERROR`."""

    def measure(study: Study) -> Quantity:
        mine = [variant(study, name) for name in names]
        if lacking := [each.name for each in mine if not each.parameters]:
            raise Missing(f"the number of parameters of {lacking[0]}")
        if len({tuple(by_seed(study, name)) for name in names}) > 1:
            raise Missing(f"{', '.join(names)} with the same seeds")
        sizes = np.log10([each.parameters for each in mine])
        weights = (sizes - sizes.mean()) / np.sum((sizes - sizes.mean()) ** 2)  # of the slope of a line
        ratios, seeds = [], []
        for each in mine:
            alike = [other for other in study.variants if other.shape == each.shape]
            curve = standard_curve(alike)
            if curve is None or not each.undiscovered:
                raise Missing(f"a curve of filtered models for {each.name}")
            tokens = [curve.equivalent(seed["ablated_forget"])[0] for seed in each.seeds]
            ratios.append([count / each.undiscovered for count in tokens])
            seeds.append(min(len(other.seeds) for other in models_read(alike, max(tokens))))
        slopes, shares = weights @ np.array(ratios), np.mean(ratios, axis=1)
        return Quantity(slopes.tolist(), error=CURVE_ERROR * math.sqrt(np.sum((weights * shares) ** 2 / seeds)))

    return measure


def models_read(alike: Sequence[Variant], most: float) -> list[Variant]:
    """Of the filtered models of a shape those from which up to `most` tokens are read: those of the curve up to the
    first that saw as many."""
    models = standard_models(alike)
    enough = next((number for number, (tokens, _) in enumerate(models) if tokens >= most), len(models))
    return [each for _, each in models[: enough + 1]]


def relearning(first: str, second: str, steps: int = STEPS, baseline: str = "unmasked") -> Measure:
    """log2 of how many times as many steps the worst attack on the first takes as that on the second, to the forget
    loss that the baseline has before any attack, on the same held-out text, within `steps`. What the first does not
    reach counts as the last step at which both were evaluated, a lower bound; for the second it is an error."""

    def measure(study: Study) -> Quantity:
        targets, ratios, missed = _before_attacks(study, baseline), [], False
        for seed, curves in _worst_cases(study, (first, second), steps).items():
            if seed in targets:
                ours, theirs = (steps_to(curve, targets[seed]) for curve in curves)
                if theirs is None:
                    raise Missing(f"{second} within {steps} steps")
                ratios.append(math.log2((ours or max(curves[0])) / theirs))
                missed |= ours is None
        return Quantity(ratios, at_least=missed)

    return measure


def _attacked_rows(study: Study, name: str) -> dict[int, dict]:
    """By seed."""
    if rows := {row["seed"]: row for row in study.tampered if row["tampered"] == name}:
        return rows
    raise Missing(f"attacks on {name}")


def _before_attacks(study: Study, name: str) -> dict[int, float]:
    return {seed: row["curve"][0]["forget"] for seed, row in _attacked_rows(study, name).items()}


def _worst_cases(study: Study, names: Sequence[str], last: int) -> dict[int, list[dict[int, float]]]:
    """For every seed that all have, and each of them: by evaluated step up to `last`, the lowest forget loss of any
    attack so far. Attacks that one of them has not gone through do not count.

    Raises Missing where they share none, or were measured on different text or in steps of different size.
    """
    rows = [_attacked_rows(study, name) for name in names]
    curves = {}
    for seed in (seed for seed in rows[0] if all(seed in each for each in rows)):
        of_seed = [each[seed] for each in rows]
        shared = set.intersection(*(set(row["attacks"]) for row in of_seed))
        if not shared or len({(row["sequences"], row["tokens"]) for row in of_seed}) > 1:
            raise Missing(f"the same attacks on {' and '.join(names)}, measured on the same text")
        curves[seed] = [_lowest([row["attacks"][attack] for attack in shared], last) for row in of_seed]
    return curves


def _lowest(attacks: Sequence[Sequence[tuple[int, float]]], last: int) -> dict[int, float]:
    curve: dict[int, float] = {}
    lowest = math.inf
    for step, loss in sorted((step, loss) for attack in attacks for step, loss in attack if step <= last):
        curve[step] = lowest = min(lowest, loss)
    return curve


def steps_to(curve: dict[int, float], target: float) -> float | None:
    """Steps at which the loss first falls to the target, between two evaluations on a line in log(1 + steps), at least
    half a step; None where it does not fall so far.

    curve  loss by evaluated step, ascending from 0
    """
    for (before, above), (after, below) in pairwise(curve.items()):
        if above <= target:
            return max(0.5, before)
        if below <= target:
            low, high = math.log1p(before), math.log1p(after)
            return max(0.5, math.expm1(low + (above - target) / (above - below) * (high - low)))
    return None


def examined(name: str, first: tuple[str, str], second: tuple[str, str]) -> Measure:
    """First minus second of two (number, model) of a variant's examinations, for every seed."""

    def measure(study: Study) -> Quantity:
        mine = [row for row in study.examined if row["examined"] == name]
        if not mine:
            raise Missing(f"examinations of {name}")
        if len({row["seed"] for row in mine}) < len(mine):
            raise Missing(f"one examination of {name} for each seed")
        rows = [row["values"] for row in mine]
        for number, model in (first, second):
            if not all(model in values.get(number, ()) for values in rows):
                raise Missing(f"{number!r} of {model!r} in every examination of {name}")
        return Quantity([values[first[0]][first[1]] - values[second[0]][second[1]] for values in rows])

    return measure
