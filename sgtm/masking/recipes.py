"""Recipes: named settings of label channel, joint parameters, domain embedding and clipping that belong together.

A recipe gives keys of the config that are not set beside it or above it; keys of what a file extends give way to it.

    paper      Selective GradienT Masking, arXiv 2512.05648, TinyStories: a quarter of the retain data in retain mode,
               the rest unlabeled, where all groups run and learn
    gram       GRAM, "Modular Pretraining Enables Access Control", ICML 2026: a fifth of the retain data, and half of
               each domain's, train the retain group and that domain's together (`open:<domain>`)
    dual       all retain data in retain mode or, a fifth of it, as the domains' own: no token trains the retain group
               while a domain's group is active, and the domain's group still learns to work on retained text
    certified  `dual`, and nothing that a domain's tokens train is left when the domain is removed: the safe model does
               not depend, in any bit, on what they say (sgtm/masking/certificate.py)
"""

from __future__ import annotations

from collections.abc import Sequence

RETAIN_SHARE = 0.8  # of retain data in retain mode, in `dual` and `certified`; 1 - p_cr in `gram`
SPREAD = 0.5  # p_as: of a domain's data, trained as `open:<domain>`

NAMES = ("paper", "gram", "dual", "certified")
KEYS = {
    "masking": ("strategy", "joint", "domain_embedding", "certify"),
    "optimizer": ("grad_clip_scope",),
    "data": ("channel", "both_ways", "schedule"),
}
"""What every recipe sets, by section."""


def recipe(name: str, domains: Sequence[str]) -> dict[str, dict]:
    """The keys of a recipe by section, for these domains. Raises ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"unknown recipe {name!r}; known recipes: {', '.join(NAMES)}")
    sure = name == "certified"
    masking = {
        "strategy": "gram" if name == "gram" else "sgtm",
        "joint": "strict" if name in ("gram", "certified") else "free",
        "domain_embedding": "full" if sure else "none",
        "certify": sure,
    }
    data = {"channel": _channel(name, domains), "both_ways": False, "schedule": {}}
    return {"masking": masking, "optimizer": {"grad_clip_scope": "owner" if sure else "global"}, "data": data}


def _channel(name: str, domains: Sequence[str]) -> dict[str, dict[str, float]]:
    if name == "paper":
        return {"retain": {"retain": 0.25, "unlabeled": 0.75}}
    label = "open" if name == "gram" else "forget"
    share = (1 - RETAIN_SHARE) / max(1, len(domains))
    rows = {"retain": {"retain": RETAIN_SHARE, **{f"{label}:{domain}": share for domain in domains}}}
    if name == "gram":
        rows |= {f"forget:{d}": {f"forget:{d}": 1 - SPREAD, f"open:{d}": SPREAD} for d in domains}
    return rows if domains else {}
