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

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from claim_measures import (
    STEPS,
    attacked,
    beyond,
    beyond_the_weak_filter,
    change_with_size,
    difference,
    examined,
    gap,
    leakage_of,
    penalty,
    relearning,
)
from tables import markdown

from sgtm.sweep.study import Interval, Study, interval


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
    *(
        Claim(
            "P" if name == "paper" else "",
            f"{name}: fine-tuning to the unmasked model's forget loss takes several times as long as after {method}",
            f"log2 of the steps, at most {STEPS}, over those after {method}",
            1,
            False,
            relearning(name, f"unmasked + {method.lower()}"),
            "",
        )
        for name in ("paper", DUAL)
        for method in ("RMU", "NPO")
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
