"""The claims of the papers, each against what a results file measured: confirmed, refuted or undecided.

    sgtm sweep launch/recipes/claims.sweep.yaml
    python benchmarks/recipes.py launch/recipes/claims.sweep.yaml --json benchmarks/results/DEVICE/claims.jsonl
    python benchmarks/report.py

`report.py` writes the table into docs/results.md. What is measured is a difference or a ratio for each seed, as mean
and 95 % confidence interval over the seeds (Student's t). A claim is confirmed where the whole interval is on its side
of a limit, refuted where it is all on the other, and undecided else. A claim whose runs are missing is not tested. P:
arXiv 2512.05648; G: GRAM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from claim_measures import (
    CURVE_ERROR,
    LINE_ERROR,
    LONG,
    SAMPLE_ERROR,
    STEPS,
    Measure,
    Missing,
    added_leakage,
    at_equal_retain,
    attacked,
    change_with_size,
    difference,
    examined,
    leakage_of,
    penalty,
    relearning,
    spill,
)
from tables import markdown

from sgtm.sweep.study import Interval, Study, interval


class Claim(NamedTuple):
    """
    limit  what the measured quantity has to be above, or below where `below`
    unit   of quantity and limit
    study  the stem of the results file
    """

    source: str
    text: str
    quantity: str
    limit: float
    below: bool
    measure: Measure
    unit: str = " nats"
    study: str = "claims"


DECIDED = ("confirmed", "refuted")


def section(studies: Mapping[str, Study]) -> str:
    """Markdown: a row for each claim."""
    table = [["source", "claim", "measured", "confirmed if", "result", "experiment"]]
    for claim in CLAIMS:
        bound = f"{'<' if claim.below else '>'} {claim.limit:g}{claim.unit}"
        value, result = _measured(claim, studies.get(claim.study))
        shown = f"**{result}**" if result in DECIDED else result
        table.append([claim.source, claim.text, f"{claim.quantity}{value}", bound, shown, f"`{claim.study}`"])
    return f"{ABOUT}\n\n{markdown(table)}"


def _measured(claim: Claim, study: Study | None) -> tuple[str, str]:
    """What was measured, and the verdict, or why there is none."""
    if study is None:
        return "", "not tested: not run"
    try:
        measured = claim.measure(study)
    except Missing as missing:
        return "", f"not tested: without {missing}"
    over_seeds = interval(measured.values)
    if over_seeds is None:
        return "", "not tested: a run has diverged" if measured.values else "not tested: no seed"
    result, unit = verdict(claim, over_seeds, measured.error), claim.unit + "*" * measured.outside
    if measured.at_least:
        unsure = "confirmed" if claim.below else "refuted"
        if not over_seeds.half:  # one bound for all seeds: that is no spread
            over_seeds = over_seeds._replace(half=None)
        return f": at least {over_seeds}{unit}", "undecided" if result == unsure else result
    error = f", error of the measure {measured.error:.3f}" * bool(measured.error)
    return f": {over_seeds}{unit}{error}", result


ABOUT = f"""\
P: arXiv 2512.05648; G: GRAM; without a letter: a question of ours.

- **Measured**: mean over the seeds ± half of the 95 % confidence interval. Some measures have a further error that the
  spread over seeds does not include (below); it is added to both ends of the interval. All that compares two runs is
  paired by seed, leakages and compute penalties too; runs of two CPUs have no more in common than those of two seeds.
  Seeds change the initial weights alone: the draw of documents is in no interval. The leakages of `sizes` are read from
  the mean over one to five seeds of filtered models. Read from one seed, a leakage is uncertain by
  {100 * CURVE_ERROR:.0f} % of itself (95 %), from n seeds by sqrt(n) less; the error of the slope follows from that of
  its ends.
- **Verdict**: confirmed where the whole interval is on the stated side of the limit, refuted where it is all on the
  other, otherwise undecided. Each stands on its own interval; none is corrected for the number of claims, nor for
  seeds that were added where three did not decide, which favours a verdict.
- **Limits**: 5 and 12 % are the papers' figures, the others are ours. Those of `arxiv`, of the added leakage, of
  relearning after unlearning and of averages over an attack were set when first results of theirs were in.
- **Size**: figures in brackets are the papers'. Ours are 1.07 M parameters, in `sizes` 0.3 to 2.2 M, and 600 steps;
  `dual` and `certified` have an embedding and a head for the domain, which makes 1.33 M. The results hold for these
  sizes only.
- **Compute penalty**: 1 minus the share of its training at which the baseline of the same seed has the loss. If a
  shorter or longer baseline has no run of this seed, its mean loss is shifted by the difference between the seeds at
  full length. If even the shortest baseline is better, the penalty of that length is reported as a lower bound. The
  tables below read their compute from the means over the seeds.
- **At equal retain loss**, the other variant is read from the line through its models of several lengths where
  there are three, else through its evaluations in training. The latter are in the middle of a training whose
  learning rate has not yet fallen: finished models of that retain loss differ from such a line by up to
  {LINE_ERROR:g} nats on the novels, and the verdict allows for as much on both sides. In `arxiv` the other lengths of
  the filter were measured on all held-out text and the rest on up to 600 sequences of each category, which moves a
  forget loss by up to {SAMPLE_ERROR:g} nats; the verdict allows for that, too. The paper's claim of weak filters is
  for any retain loss; ours is for that of the finished model.
- **\\***: beyond the ends of a curve. No length of the baseline reaches the loss, or no model of the other variant
  has the retain loss.
- **Attacks**: the worst of those in the commands of `claims`, which train forget data alone; a stronger one may exist.
  Steps to a loss are read between two evaluations. `paper` starts
  an attack as the worse model, and a worse model fine-tunes more slowly."""


def verdict(claim: Claim, over_seeds: Interval, error: float = 0.0) -> str:
    """error: of the measure itself, which no seed shows; it counts on both sides."""
    if over_seeds.half is None:
        return "not tested: one seed"
    half = over_seeds.half + error
    low, high = over_seeds.mean - half, over_seeds.mean + half
    inside, outside = (
        (high < claim.limit, low > claim.limit) if claim.below else (low > claim.limit, high < claim.limit)
    )
    return "confirmed" if inside else "refuted" if outside else "undecided"


WEAK = "filtered-undiscovered"
PAPER, DUAL = "paper-undiscovered", "dual"
HIDDEN = {PAPER: "undiscovered", DUAL: "labelled to train retain weights as well"}
"""What is done to a fifth of the forget data."""
ARXIV = (("", "paper"), ("P", "paper-masked"), ("", "dual"))
"""The paper's Wikipedia models mask the joint parameters, those of its TinyStories do not."""
CLAIMS = (
    *(
        Claim(
            "P" if name == PAPER else "",
            f"{name}: with a fifth of the forget data {HIDDEN[name]}, the ablated model has forgotten more than a "
            f"filter that lets the same share of the forget tokens through, at the same retain loss",
            "forget loss, ablated, minus that of the filter",
            0,
            False,
            at_equal_retain(name, WEAK),
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
            at_equal_retain(name, "filtered"),
            study="arxiv",
        )
        for source, name in ARXIV
    ),
    *(
        Claim(
            "",
            f"{name}: beyond what it costs other text, removing biology costs the fields close to it less than a "
            f"quarter of what it costs biology",
            "rise of the adjacent loss by ablation minus that of the retain loss, less a quarter of the same for the "
            "forget loss",
            0,
            True,
            spill(name),
            study="arxiv",
        )
        for _, name in ARXIV
    ),
    *(
        Claim(
            "P" if name == PAPER else "",
            f"{name}: all that the ablated model has learned of the domain is little beside the fifth that is "
            + HIDDEN[name]
            + " (64M: 0.005 to 0.02 of it)" * (name == PAPER),
            "leakage",
            0.1,
            True,
            leakage_of(name),
            "",
        )
        for name in (PAPER, DUAL)
    ),
    Claim(
        "",
        "paper-undiscovered: what is undiscovered adds little to what leaks of labelled data",
        "leakage with the fifth undiscovered, minus that with all labels",
        0.05,
        True,
        added_leakage(PAPER, "paper"),
        "",
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
        )
        for name in ("paper", DUAL)
    ),
    *(
        Claim(
            "P",
            f"paper-undiscovered: masked updates forget more than {what}, at the same retain loss",
            "forget loss, ablated, minus that of the other",
            0,
            False,
            at_equal_retain(PAPER, name),
        )
        for name, what in (
            ("gradient_routing-undiscovered", "gradient routing, which lets forget data train what is shared"),
            ("activation_masking-undiscovered", "masked activations"),
        )
    ),
    Claim(
        "P",
        "paper-large-share: masked updates forget more than gradient routing at twice the parameters (2.2 M), at the "
        "same retain loss",
        "forget loss, ablated, minus that of the other",
        0,
        False,
        at_equal_retain("paper-large-share", "gradient_routing-large"),
        study="sizes",
    ),
    *(
        Claim(
            "P" if name == "paper" else "",
            f"{name}: after {STEPS} steps of fine-tuning, the domain is no better known than to a filtered model",
            f"forget loss after the worst attack of {STEPS} steps, minus that on filtered",
            -0.1,
            False,
            attacked(name, "filtered", STEPS),
        )
        for name in ("paper", DUAL, "certified")
    ),
    *(
        Claim(
            "P" if name == "paper" else "",
            f"{name}: the same on average over the first {STEPS} steps",
            "forget loss after the worst attack, minus that on filtered, mean over 1, 2, 4 and so on to 64 steps",
            -0.1,
            False,
            attacked(name, "filtered"),
        )
        for name in ("paper", DUAL, "certified")
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
            examined(name, ("loss at 4 bits, es", "without es"), ("loss unrounded, es", "without es")),
        )
        for name in ("paper", DUAL)
    ),
    *(
        Claim(
            "P" if (name, method) == ("paper", "RMU") else "",
            f"{name}: fine-tuning to the unmasked model's forget loss takes more than twice as long as after {method}"
            + " (the paper: 7 times)" * ((name, method) == ("paper", "RMU")),
            f"log2 of the steps, at most {steps}, over those after {method}",
            1,
            False,
            relearning(name, f"unmasked + {method.lower()}", steps),
            "",
        )
        for name in ("paper", DUAL)
        for method, steps in (("RMU", STEPS), ("NPO", LONG))
    ),
    *(
        Claim(
            "P" if name == "paper" else "",
            f"{name}: fine-tuning to the unmasked model's forget loss takes about as long as that of a filtered model",
            f"log2 of the steps, at most {LONG}, over those of filtered",
            -0.5,
            False,
            relearning(name, "filtered", LONG),
            "",
        )
        for name in ("paper", DUAL, "certified")
    ),
    Claim(
        "G",
        "gram: the full model keeps 88 % of the compute on retained data (26M to 100M parameters)",
        "compute penalty",
        12,
        True,
        penalty("gram", "full_retain", "unmasked"),
        " %",
    ),
    Claim(
        "G",
        "gram: without the domain's module, which half of its data train alone, the model knows no more of the domain "
        "than a filtered one (800M; less so at 26M)",
        "forget loss, ablated, minus that of filtered",
        -0.1,
        False,
        difference(("gram", "ablated_forget"), ("filtered", "full_forget")),
    ),
    Claim(
        "G",
        "gram-half: with half of the labels, the ablated model has forgotten more than a filter that lets the other "
        "half through, at the same retain loss (400M)",
        "forget loss, ablated, minus that of the filter",
        0,
        False,
        at_equal_retain("gram-half", "filtered-half"),
    ),
)


if __name__ == "__main__":
    import sys
    from pathlib import Path

    from sgtm.sweep.study import read_study

    print(section({Path(file).stem: read_study(Path(file)) for file in sys.argv[1:]}))
