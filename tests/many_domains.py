"""An evaluation of many domains with losses that are known: what tests of its tables, sentences and figures share."""

from __future__ import annotations


def names(count: int) -> list[str]:
    return [f"d{i}" for i in range(1, count + 1)]


def summary(count: int, *chosen: tuple[str, ...]) -> dict:
    """As `summary.json` holds it: a category for each domain, and two that are retained.

    Without a domain its own loss rises by its number over 10, that of `en` by 0.01 and every other domain's by 0.02.
    Tokens: 3,000 of `en` and 1,000 of each other category. chosen: sets besides none, each and all.
    """
    domains, true = names(count), {"en": "retain", "fr": "retain"}
    true |= {domain: f"forget:{domain}" for domain in domains}
    full = {category: 2.0 + 0.1 * i for i, category in enumerate(true)}
    losses = {"full": full}
    for removed in (*((domain,) for domain in domains), *chosen, tuple(domains)):
        losses["without " + ",".join(removed)] = {
            category: loss
            + (int(category[1:]) / 10 if category in removed else 0.02 if category in domains else 0.0)
            + (0.01 if category == "en" else 0.0)
            for category, loss in full.items()
        }
    measured = {category: {"documents": 5, "tokens": 3000 if category == "en" else 1000} for category in true}
    return {"name": "many", "steps": 8, "losses": losses, "true_labels": true, "measured": measured}


def tokens(of: dict) -> dict[str, int]:
    return {category: count["tokens"] for category, count in of["measured"].items()}
