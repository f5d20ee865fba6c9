"""The page of a study: one HTML file that needs nothing else, and its figures as PNGs beside it.

Everything on it follows from the rows (study.py). Promises, each in `tests/unit/test_sweep_page.py`: the page asks the
network for nothing; its table holds exactly the means of the rows; a figure that the rows do not allow is missing from
the page, with the reason in its place.
"""

from __future__ import annotations

from pathlib import Path

from sgtm.report.figures import draw
from sgtm.report.page import Exhibit, template, write_page
from sgtm.sweep import study_figures as figures
from sgtm.sweep.study import Study, differing_settings, examinations, examined_with, leakages

SERIES = (
    "Filled marks: the last losses of models from which the domains can be removed; hollow ones: of the others, which "
    "were trained without masks; bars: 95 % confidence intervals over the seeds. Line: the evaluations in training, "
    "mean over the seeds."
)
EXHIBITS = (
    (
        figures.ablated,
        "Ablated: forget loss against retain loss of the models that are served without the domains. Up and left is "
        f"better. {SERIES}",
        "No losses.",
    ),
    (
        figures.adjacent,
        "Adjacent: forget loss of the served models against their loss on the categories that are close to a domain. "
        f"{SERIES}",
        "No losses on adjacent categories: `adjacent` in the sweep file chooses them.",
    ),
    (
        figures.full,
        f"Full: forget loss against retain loss of the full models. Down and left is better. {SERIES}",
        "No losses.",
    ),
    (
        figures.front,
        "The price of removal: forget loss of the models that are served without the domains against the retain loss "
        "of the full models. Up and left is better. Line: masked variants that no other masked one beats in both; "
        "hollow: models that were trained without masks, which serve one model for both.",
        "No masked variant with losses.",
    ),
    (
        figures.absorbed,
        "Absorption over training: of what the full model has learned of forgotten data, the share that the domains' "
        "groups hold. 1: without them the model knows no more than one that was trained without the data; above 1: it "
        "is worse on them than that one; 0: it knows as much as with them. Bars: 95 % confidence intervals over the "
        "seeds; the error of the curve is not in them.",
        "No absorption: it takes evaluations in training (`train.eval_every`) of masked models and of one that was "
        "trained without masks and without forget tokens.",
    ),
    (
        figures.undiscovered,
        "Undiscovered data: forget loss of the served models against the forget tokens that retain weights were "
        "trained on: those without their label, and those with the label open:DOMAIN. Line: models that were "
        "trained without masks, from which leakage is read. A model above the line has removed part of them; the "
        "line's tokens at its loss, over its own, are the leakage.",
        "No forget loss against undiscovered forget tokens: it takes models with masks and without, and rows with "
        "`trained`.",
    ),
    (
        figures.leaked,
        "Leakage: forget tokens that a model without masks has to see to reach the ablated model's forget loss, as a "
        "share of those that its retain weights were trained on. 0: nothing has leaked; 1: masks had no effect. Bars: "
        "95 % confidence intervals over the seeds, each of which has the curve of its own seed where there is one.",
        "No leakage: it takes masked models with undiscovered forget tokens, and models without masks that saw none "
        "and three other numbers of them.",
    ),
    (
        figures.sizes,
        "Leakage against the size of the model. Each is read from models of its own shape that were trained without "
        "masks.",
        "No leakage at two sizes.",
    ),
    (
        figures.residual,
        "Norm of the residual stream after the last layer (L2) at the end of training: mean over tokens, for the label "
        "with the largest, then over seeds. Many times that of training without masks means that the "
        "groups out-shout one another.",
        "No norms of the residual stream.",
    ),
    (
        figures.tampering,
        "Tampering: the lowest held-out forget loss that any attack of the grid has reached by a number of steps of "
        "fine-tuning, a line for each seed. Compare with the model that was trained without the domain, to which an "
        "attack has to teach all of it, after the same attacks: more of them, or longer ones, reach lower.",
        "No tamper curves: `sgtm tamper` writes them to the runs.",
    ),
)


def write_study(study: Study, folder: Path) -> Path:
    """Write `index.html` and its PNGs into a folder, which is made, and return the page's path."""
    exhibits = [Exhibit(p.__name__, caption, missing, draw(p.__name__, study, p)) for p, caption, missing in EXHIBITS]
    return write_page(folder, exhibits, render(study, exhibits))


def render(study: Study, exhibits: list[Exhibit]) -> str:
    """The page as HTML."""
    seeds = sorted({len(variant.seeds) for variant in study.variants})
    return template("study.html.j2", "sgtm.sweep").render(
        study=study,
        seeds="no" if not seeds else str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}",
        leakages=leakages(study.variants),
        examinations=examinations(study),
        examined_with="; ".join(dict.fromkeys(examined_with(row) for row in study.examined)),
        settings=differing_settings(study.variants),
        common=_common(study),
        provenance={key: origins for key in ("device", "commit") if (origins := _origins(study, key))},
        exhibits=exhibits,
    )


def _origins(study: Study, key: str) -> str:
    """Of the training of all variants, each once; a variant whose seeds come from several machines has several."""
    named = (variant.origin.get(key, "") for variant in study.variants)
    return ", ".join(dict.fromkeys(part for parts in named if parts for part in parts.split(", ")))


def _common(study: Study) -> dict[str, object]:
    """Settings that all variants share."""
    if not study.variants:
        return {}
    differ = differing_settings(study.variants)[study.variants[0].name]
    return {key: value for key, value in study.variants[0].settings.items() if key not in differ}
