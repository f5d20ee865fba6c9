"""What an evaluation has found, as one table, and what of it is worth a warning; page and terminal show the same."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sgtm.data.summary import FEW_TOKENS
from sgtm.masking.labels import removed_domains

UNCHANGED = 0.005  # nats: below this a difference prints as 0.00
CERTAIN = 2.0  # standard errors
SMALL = f"fewer than {FEW_TOKENS:,} tokens were measured"


@dataclass(frozen=True)
class LossRow:
    """Losses of one category, nats per token, by condition (`full`, `without es`, ...); NaN for one not finite.

    errors             standard errors over the documents, where they were recorded
    difference_errors  those of the difference to the full model
    tokens             measured targets; None where that was not recorded
    """

    category: str
    true_label: str
    losses: dict[str, float]
    errors: dict[str, float] = field(default_factory=dict)
    difference_errors: dict[str, float] = field(default_factory=dict)
    tokens: int | None = None

    def difference(self, condition: str) -> float:
        return self.losses[condition] - self.losses["full"]

    @property
    def small(self) -> bool:
        """Whether so little was measured that the losses are not reliable."""
        return self.tokens is not None and self.tokens < FEW_TOKENS


def conditions(summary: dict) -> list[str]:
    """Keys of the losses that have something removed, fewer domains first."""
    found = [key for key in summary.get("losses", {}) if removed_domains(key)]
    return sorted(found, key=lambda key: len(removed_domains(key)))


def loss_rows(summary: dict) -> list[LossRow]:
    """One row per category: what is to be kept first, what is to be forgotten last."""

    def of(key: str, category: str) -> dict[str, float]:
        values = {name: by[category] for name, by in summary.get(key, {}).items() if category in by}
        return {name: math.nan if value is None else value for name, value in values.items()}

    true = summary.get("true_labels", {})
    rows = [
        LossRow(
            category,
            true.get(category, ""),
            losses=of("losses", category),
            errors=of("errors", category),
            difference_errors=of("difference_errors", category),
            tokens=_measured(summary, category),
        )
        for category in summary.get("losses", {}).get("full", {})
    ]
    return sorted(rows, key=lambda row: row.true_label.startswith("forget:"))


def _measured(summary: dict, category: str) -> int | None:
    """Tokens that the losses rest on; of an older record those of the split, if all of it was measured."""
    if "measured" in summary:
        return summary["measured"].get(category, {}).get("tokens")
    everything = summary.get("sequences") is None and "in_training" not in summary
    of_split = summary.get("counts", {}).get(summary.get("split"), {}) if everything else {}
    return of_split.get(category, {}).get("tokens")


def cautions(summary: dict) -> list[str]:
    """Cautions for a reader of the losses; code words in backticks."""
    rows = loss_rows(summary)
    found = [
        sentence for condition in conditions(summary) for sentence in _worse_than_ablated(summary, rows, condition)
    ]
    if small := [f"{row.category} ({row.tokens:,})" for row in rows if row.small]:
        found.append(f"In grey: {listed(small)}; {SMALL}, so these losses are not reliable.")
    return found


def _worse_than_ablated(summary: dict, rows: list[LossRow], condition: str) -> list[str]:
    """Where the full model is worse on retained data than its own ablated one, beyond chance, and why."""
    worse = []
    for row in rows:
        if row.true_label == "retain" and condition in row.losses and not row.small:
            by, error = -row.difference(condition), row.difference_errors.get(condition, 0.0)
            worse += [f"{by:.2f} nats on {row.category}"] if by >= max(UNCHANGED, CERTAIN * error) else []
    domains = removed_domains(condition)
    if not worse or len(domains) > 1:  # several removed: each of them has its own sentence
        return []
    share = summary.get("retain_with_group", {}).get(domains[0])
    text = f"The full model is worse on retained data than the model without `{domains[0]}`, by {listed(worse)}: "
    if share is None:
        return [f"{text}does a share of the retain data train with the group `{domains[0]}` running (`data.channel`)?"]
    trained = f"are trained with the group `{domains[0]}` running"
    if share == 1:
        return [f"{text}although all retain data {trained}; see the norms of the residual stream."]
    reason = f"no retain data {trained}" if share == 0 else f"only {share:.0%} of the retain data {trained}"
    remedy = f"a {'larger ' * (share > 0)}share of the `retain` row of `data.channel` as `open:{domains[0]}`"
    return [f"{text}{reason}. Remedy: {remedy}, in place of `retain` or in addition (`data.both_ways`)."]


def localisation(summary: dict) -> list[str]:
    """How the gradient norms compare, a sentence for each label that has a group of its own."""
    sentences = []
    for label, norms in summary.get("gradient_norms", {}).items():
        own = label.removeprefix("forget:")
        others = {group: norm for group, norm in norms.items() if group != own}
        if own not in norms or not others:
            continue
        group = max(others, key=others.__getitem__)
        if others[group] > 0:
            ratio = norms[own] / others[group]
            times = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
            sentences.append(f"{label} data: {times} times as strong on {own} as on {group}.")
    return sentences


def signed(difference: float, digits: int) -> str:
    """'+3.21', '−0.02' with a minus sign as wide as the plus."""
    return f"{difference:+.{digits}f}".replace("-", "−")


def error_of(error: float) -> str:
    """'0.012'; one that would round to 0 is shown as 0.001."""
    return f"{max(error, 1e-3) if error else 0:.3f}"


def listed(words: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
