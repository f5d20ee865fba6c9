"""What the removal of domains does to the losses, where there are too many sets to show each loss of each.

With K domains an evaluation has K + 2 sets or more, and as many losses in each. An *effect* is the change of the full
model's loss by true label, a mean over the measured tokens of the label's categories: on the data of the domains that
were removed, of each other domain, and of retained data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from sgtm.masking.labels import FORGET, FULL, WITHOUT, lowered_domains

MANY = 3  # conditions: more are shown as effects
LISTED = 3  # domains in the name of a condition; of more, how many
Losses = Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class Effect:
    """Changes to the full model's losses, nats per token; NaN for one that is not finite.

    own       by domain that the condition removes or lowers, of its own data
    others    by other domain, of its data
    retained  by true label `retain` and `unlabeled`
    """

    own: dict[str, float]
    others: dict[str, float]
    retained: dict[str, float]


def by_true_label(
    by_category: Mapping[str, float | None], true_labels: Mapping[str, str], tokens: Mapping[str, int]
) -> dict[str, float]:
    """Mean loss of each true label over the tokens of its categories, labels in the order of their first category.

    tokens  measured, by category; categories that are left out all weigh alike
    """
    sums: dict[str, list[tuple[float, float]]] = {}
    for category, loss in by_category.items():
        value = math.nan if loss is None else loss
        sums.setdefault(true_labels.get(category, category), []).append((value, tokens.get(category, 1)))
    return {
        label: sum(loss * count for loss, count in parts) / total
        for label, parts in sums.items()
        if (total := sum(count for _, count in parts))
    }


def effects(losses: Losses, true_labels: Mapping[str, str], tokens: Mapping[str, int]) -> dict[str, Effect]:
    """By condition other than `full`; arguments as in `by_true_label`."""
    full = by_true_label(losses.get(FULL, {}), true_labels, tokens)
    by_condition = {}
    for condition, by_category in losses.items():
        if condition == FULL:
            continue
        changes = {
            label: loss - full[label]
            for label, loss in by_true_label(by_category, true_labels, tokens).items()
            if label in full
        }
        domains = {label.removeprefix(FORGET): change for label, change in changes.items() if label.startswith(FORGET)}
        lowered = lowered_domains(condition)
        by_condition[condition] = Effect(
            {domain: change for domain, change in domains.items() if domain in lowered},
            {domain: change for domain, change in domains.items() if domain not in lowered},
            {label: change for label, change in changes.items() if not label.startswith(FORGET)},
        )
    return by_condition


def short_name(condition: str, domains: int) -> str:
    """`without bio`, `without all 20 domains`, `without 7 domains (bio, cyber, ...)`: a name of bounded length.

    domains  how many there are
    """
    lowered = lowered_domains(condition)
    if len(lowered) <= LISTED or not condition.startswith(WITHOUT):
        return condition
    if len(lowered) == domains:
        return f"{WITHOUT}all {domains} domains"
    return f"{WITHOUT}{len(lowered)} domains ({', '.join(lowered[: LISTED - 1])}, ...)"


def described(losses: Losses, true_labels: Mapping[str, str], tokens: Mapping[str, int]) -> list[str]:
    """The effects in a sentence for all domains that were removed by themselves, and one for each other condition."""
    of = effects(losses, true_labels, tokens)
    domains = len({label for label in true_labels.values() if label.startswith(FORGET)})
    alone = [name for name in of if name.startswith(WITHOUT) and len(lowered_domains(name)) == 1]
    sentences = []
    if len(alone) > 1:
        parts = _parts([of[name] for name in alone])
        sentences.append(f"Removing one of {len(alone)} domains changes the loss {parts}, in nats per token.")
    rest = [name for name in of if name not in alone or len(alone) < 2]
    sentences += [f"{short_name(name, domains).capitalize()}: {_parts([of[name]])}." for name in rest]
    return sentences


def _parts(of: list[Effect]) -> str:
    """'on its own data by +2.31 (+1.20 on d3 to +3.10 on d7), on other domains by ..., on retain data by ...'."""
    sources = {
        "its own data" if len(of) > 1 else "the data of its domains": [pair for e in of for pair in e.own.items()],
        "other domains": [pair for e in of for pair in e.others.items()],
        **{f"{label} data": [(label, e.retained[label]) for e in of] for label in (of[0].retained if of else {})},
    }
    return ", ".join(f"on {name} by {_spread(pairs)}" for name, pairs in sources.items() if pairs)


def _spread(pairs: list[tuple[str, float]]) -> str:
    """The mean, with the smallest and the largest change where they differ."""
    if bad := [name for name, change in pairs if not math.isfinite(change)]:
        return f"an infinite or undefined amount on {bad[0]}"
    least, most = min(pairs, key=lambda pair: pair[1]), max(pairs, key=lambda pair: pair[1])
    mean = f"{fmean(change for _, change in pairs):+.2f}"
    if f"{least[1]:.2f}" == f"{most[1]:.2f}":
        return mean
    named = [f"{change:+.2f}" + (f" on {name}" if least[0] != most[0] else "") for name, change in (least, most)]
    return f"{mean} ({' to '.join(named)})"
