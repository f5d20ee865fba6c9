"""The claims of the papers, each against what a results file measured: confirmed, refuted or undecided.

    sgtm sweep launch/recipes/claims.sweep.yaml
    python benchmarks/recipes.py launch/recipes/claims.sweep.yaml --json benchmarks/results/DEVICE/claims.jsonl
    python benchmarks/report.py

`report.py` writes the table into docs/results.md. What is measured is a difference or a ratio for each seed, paired by
seed, as mean and 95 % confidence interval over the seeds (Student's t). A claim is confirmed where the whole interval
is on its side of a limit, refuted where it is all on the other, and undecided else. A claim whose runs are missing is
not tested. P: arXiv 2512.05648; G: GRAM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from tables import markdown

from sgtm.evaluation.compute_ratio import LEAST, ComputeRatio, LearningCurve
from sgtm.sweep.study import Interval, Study, Variant, interval, leakages

STEPS = 64
"""Of the attacks that are compared."""


class Claim(NamedTuple):
    """limit: what the measured quantity has to be above, or below where `below`; unit: of quantity and limit; outside:
    whether the quantity is extrapolated; study: the stem of the results file."""

    source: str
    text: str
    quantity: str
    limit: float
    below: bool
    measure: Callable[[Study], Iterable[float]]
    unit: str = " nats"
    outside: Callable[[Study], bool] = lambda study: False
    study: str = "claims"


def section(studies: Mapping[str, Study]) -> str:
    """Markdown: a row for each claim."""
    table = [["source", "claim", "measured", "confirmed", "result", "experiment"]]
    for claim in CLAIMS:
        study = studies.get(claim.study, Study(claim.study, (), ()))
        measured = _interval(claim, study)
        bound = f"{'<' if claim.below else '>'} {claim.limit:g}{claim.unit}"
        star = "*" if measured and claim.outside(study) else ""
        value = "" if measured is None else f": {measured}{claim.unit}{star}"
        result, experiment = verdict(claim, measured), f"`{claim.study}`"
        table.append([claim.source, claim.text, f"{claim.quantity}{value}", bound, result, experiment])
    return f"{ABOUT}\n\n{markdown(table)}"


ABOUT = (
    "Measured: mean over the seeds ± half of the 95 % confidence interval, paired by seed. A claim is confirmed where "
    "the whole interval is on the stated side of the limit, refuted where it is all on the other, undecided else. The "
    "limits of 5 and 12 % are the papers' figures; the others are ours, set before the runs. P: arXiv 2512.05648; G: "
    "GRAM; the sizes in brackets are theirs. Ours have 1.07 M parameters, in `sizes` 0.3 to 2.2 M, and 600 steps: no "
    "result here is one at other sizes. Experiment: the section below that the figures are from. * extrapolated "
    "beyond the shortest baseline; the error of a baseline's curve, whose other lengths have one seed, is in no "
    "interval. A model that masks have made worse learns anything more slowly: read what is measured of fine-tuning "
    "`paper` beside its retain losses below. RMU is one setting, chosen by hand (LOG.md)."
)


def verdict(claim: Claim, measured: Interval | None) -> str:
    if measured is None or measured.half is None:
        return "not tested"
    low, high = measured.mean - measured.half, measured.mean + measured.half
    inside, outside = (
        (high < claim.limit, low > claim.limit) if claim.below else (low > claim.limit, high < claim.limit)
    )
    return "**confirmed**" if inside else "**refuted**" if outside else "undecided"


def _interval(claim: Claim, study: Study) -> Interval | None:
    """None where a run that the claim needs is missing."""
    try:
        return interval(list(claim.measure(study)))
    except LookupError:
        return None


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
        rows = [row for row in study.tampered if row["tampered"] == name] or _missing(name)
        curves = {row["seed"]: [point for point in row["curve"] if point["step"] <= STEPS] for row in rows}
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


def examined(name: str, first: tuple[str, str], second: tuple[str, str]) -> Callable[[Study], list[float]]:
    """First minus second of two (number, model) of a variant's examinations, for every seed."""

    def measure(study: Study) -> list[float]:
        rows = [row["values"] for row in study.examined if row["examined"] == name] or _missing(name)
        return [values[first[0]][first[1]] - values[second[0]][second[1]] for values in rows]

    return measure


WEAK = "filtered-undiscovered"
PAPER, DUAL = "paper-undiscovered", "dual"
ARXIV = (("", "paper"), ("P", "paper-masked"), ("", "dual"))
"""The paper's Wikipedia models mask the joint parameters, those of its TinyStories do not."""
CLAIMS = (
    *(
        Claim(
            "P" if name == PAPER else "",
            f"{name}: with a fifth of the forget data undiscovered, the ablated model has forgotten more than a weak "
            f"filter at the same retain loss",
            "forget loss, ablated, minus that of the filter",
            0,
            False,
            beyond_the_weak_filter(name, WEAK),
        )
        for name in (PAPER, DUAL)
    ),
    *(
        Claim(
            source,
            f"{name}: with all labels, the ablated model has forgotten more biology than a weak filter at the same "
            f"retain loss",
            "forget loss, ablated, minus that of the filter",
            0,
            False,
            beyond_the_weak_filter(name, "filtered"),
            study="arxiv",
        )
        for source, name in ARXIV
    ),
    *(
        Claim(
            source,
            f"{name}: the ablated model is not worse on the fields close to biology than on others, as it is after a "
            f"filter that drops them too",
            "adjacent minus retain loss, ablated, minus the same of the strict filter",
            0,
            True,
            gap(name, "filtered-strict"),
            study="arxiv",
        )
        for source, name in ARXIV
    ),
    *(
        Claim(
            "P" if name == PAPER else "",
            f"{name}: the fifth that was undiscovered hardly leaks into the ablated model",
            "leakage",
            0.1,
            True,
            leakage_of(name),
            "",
        )
        for name in (PAPER, DUAL)
    ),
    *(
        Claim(
            "P" if kind == "share" else "",
            f"paper: leakage falls with the size of the model, at a constant {of} of heads and neurons for the domain",
            "change of the leakage with ten times the parameters",
            0,
            True,
            change_with_size([f"paper-small-{kind}", "paper-middle-share", f"paper-large-{kind}"]),
            "",
            study="sizes",
        )
        for kind, of in (("share", "share"), ("count", "number"))
    ),
    *(
        Claim(
            "P" if name == "paper" else "",
            f"{name}: masks cost the full model little on retained data{' (254M)' if name == 'paper' else ''}",
            "compute penalty",
            5,
            True,
            penalty(name, "full_retain", "unmasked"),
            " %",
            beyond(name, "full_retain", "unmasked"),
        )
        for name in ("paper", DUAL)
    ),
    Claim(
        "P",
        "gradient routing, which lets forget data train what is shared, forgets less than masked updates",
        "forget loss, ablated, of paper-undiscovered minus gradient_routing-undiscovered",
        0,
        False,
        difference((PAPER, "ablated_forget"), ("gradient_routing-undiscovered", "ablated_forget")),
    ),
    *(
        Claim(
            "P" if name == "paper" else "",
            f"{name}: fine-tuning brings the domain back no sooner than into a filtered model",
            f"lowest forget loss of any attack of {STEPS} steps, minus that on filtered",
            -0.1,
            False,
            attacked(name, "filtered"),
        )
        for name in ("paper", DUAL)
    ),
    *(
        Claim(
            "",
            f"{name}: the ablated model makes no more of the domain's text in its context than a filtered model does",
            "gain by context, ablated, minus that of filtered",
            0.1,
            True,
            examined(name, ("gain by context, es", "without es"), ("gain by context, es", "control")),
        )
        for name in ("paper", DUAL)
    ),
    *(
        Claim(
            "",
            f"{name}: rounding the ablated model to 4 bits does not bring the domain back",
            "forget loss, ablated, at 4 bits minus without rounding",
            -0.1,
            False,
            examined(name, ("loss at 4 bits, es", "without es"), ("loss, es", "without es")),
        )
        for name in ("paper", DUAL)
    ),
    Claim(
        "P",
        "paper: fine-tuning brings the domain back later than after RMU, in one setting of it",
        f"lowest forget loss of any attack of {STEPS} steps, minus that after RMU",
        0,
        False,
        attacked("paper", "unmasked + rmu"),
    ),
    Claim(
        "G",
        "gram: the full model keeps 88 % of the compute on retained data (26M to 100M parameters)",
        "compute penalty",
        12,
        True,
        penalty("gram", "full_retain", "unmasked"),
        " %",
        beyond("gram", "full_retain", "unmasked"),
    ),
    Claim(
        "G",
        "gram: without the domain's module the model knows no more of it than a filtered one (800M; less so at 26M)",
        "forget loss, ablated, minus that of filtered",
        -0.1,
        False,
        difference(("gram", "ablated_forget"), ("filtered", "full_forget")),
    ),
)


if __name__ == "__main__":
    import sys
    from pathlib import Path

    from sgtm.sweep.study import read_study

    print(section({Path(file).stem: read_study(Path(file)) for file in sys.argv[1:]}))
