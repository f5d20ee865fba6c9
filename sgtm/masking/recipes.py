"""Recipes: named settings of strategy, label channel, joint parameters, embedding and clipping that belong together.

Keys beside a recipe, or on the command line, override it; it overrides the keys of the file that is extended.

    paper      Selective GradienT Masking, arXiv 2512.05648, TinyStories: a quarter of the retain data in retain mode,
               the rest unlabeled, where all groups run and learn
    gram       GRAM, "Modular Pretraining Enables Access Control", ICML 2026: a fifth of the retain data, and half of
               each domain's, train the retain group and that domain's together (`open:<domain>`)
    dual       gradient routing (arXiv 2410.04332) with an embedding and head of each domain's own: two fifths of the
               retain data, and a fifth of each domain's, train the retain group and that domain's together; the rest of
               the domain's data leaves the joint parameters and the retain group's inputs alone. Of several domains,
               half of those fifths train all groups together (`unlabeled`), or the full model would be a combination
               that was never trained
    certified  a domain's data train its group alone, as does a fifth of the retain data: the safe model does not
               depend, in any bit, on what the domain's documents say (sgtm/masking/certificate.py)

docs/recipes.md compares `dual`, `certified` and `paper` in variants; docs/results.md has `gram` beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

Name = Literal["paper", "gram", "dual", "certified"]
NAMES: tuple[Name, ...] = get_args(Name)
KEYS = {
    "masking": ("strategy", "joint", "domain_embedding", "certify"),
    "optimizer": ("grad_clip_scope",),
    "data": ("channel", "both_ways", "schedule"),
}
"""What every recipe sets, by section."""


class Shares(NamedTuple):
    """Of a channel.

    mixed   of the retain data, trained with a domain's group running (p_cr in GRAM)
    label   as what: `forget` (the domain's group alone learns) or `open` (it and the retain group)
    spread  of a domain's data, trained as `open` (p_as in GRAM)
    joined  of either of these, where there are several domains, trained as `unlabeled`: all groups run, and learn
    """

    mixed: float
    label: str
    spread: float
    joined: float = 0


SHARES = {
    "gram": Shares(0.2, "open", 0.5),
    "dual": Shares(0.4, "open", 0.2, 0.5),
    "certified": Shares(0.2, "forget", 0),
}


def recipe(name: str, domains: Sequence[str], unmasked: bool = False) -> dict[str, dict]:
    """The keys of a recipe by section, for these domains. Raises ValueError for an unknown name.

    unmasked  of the baseline without masks (strategy `none`): no part of the recipe is left
    """
    if name not in NAMES:
        raise ValueError(f"unknown recipe {name!r}; known recipes: {', '.join(NAMES)}")
    if unmasked:
        masking = {"strategy": "none", "joint": "free", "domain_embedding": "none", "certify": False}
        data = {"channel": {}, "both_ways": False, "schedule": {}}
        return {"masking": masking, "optimizer": {"grad_clip_scope": "global"}, "data": data}
    certified = name == "certified"
    masking = {
        "strategy": {"gram": "gram", "dual": "gradient_routing"}.get(name, "sgtm"),
        "joint": "free" if name == "paper" else "strict",
        "domain_embedding": "full" if name in ("dual", "certified") else "none",
        "certify": certified,
    }
    data = {"channel": _channel(name, domains), "both_ways": False, "schedule": {}}
    return {"masking": masking, "optimizer": {"grad_clip_scope": "owner" if certified else "global"}, "data": data}


def _channel(name: str, domains: Sequence[str]) -> dict[str, dict[str, float]]:
    if name == "paper":
        return {"retain": {"retain": 0.25, "unlabeled": 0.75}}
    if not domains:
        return {}
    mixed, label, spread, joined = SHARES[name]
    joined *= len(domains) > 1

    def shared(share: float, labels: Sequence[str]) -> dict[str, float]:
        apart = {each: share * (1 - joined) / len(labels) for each in labels}
        return apart | ({"unlabeled": share * joined} if joined else {})

    rows = {"retain": {"retain": 1 - mixed, **shared(mixed, [f"{label}:{domain}" for domain in domains])}}
    if spread:
        rows |= {f"forget:{d}": {f"forget:{d}": 1 - spread, **shared(spread, [f"open:{d}"])} for d in domains}
    return rows
