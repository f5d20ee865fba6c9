"""What the figures of a run say, in words and as one table; the page and the terminal show the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sgtm.masking.labels import removed_domains
from sgtm.report.record import Record, is_forgotten

UNCHANGED = 0.005  # nats: below this a difference prints as 0.00
NAMED = 3  # so many kept categories are named in a sentence; more are averaged


@dataclass(frozen=True)
class LossRow:
    """Losses of one category, nats per token, by condition (`full`, `without es`, ...)."""

    category: str
    true_label: str
    losses: dict[str, float]

    def difference(self, condition: str) -> float:
        return self.losses[condition] - self.losses["full"]


def conditions(summary: dict) -> list[str]:
    """Keys of the losses that have something removed, fewer domains first."""
    found = [key for key in summary.get("losses", {}) if removed_domains(key)]
    return sorted(found, key=lambda key: len(removed_domains(key)))


def loss_rows(summary: dict) -> list[LossRow]:
    """One row per category: what is to be kept first, what is to be forgotten last."""
    losses, true = summary.get("losses", {}), summary.get("true_labels", {})
    rows = [
        LossRow(category, true.get(category, ""), {key: by[category] for key, by in losses.items() if category in by})
        for category in losses.get("full", {})
    ]
    return sorted(rows, key=lambda row: row.true_label.startswith("forget:"))


def sentences(record: Record) -> list[str]:
    """What happened, the first sentence first; code words in backticks."""
    rows = loss_rows(record.summary)
    found = [_removal(condition, rows) for condition in conditions(record.summary)]
    if found:
        return found
    if rows:
        full = [f"{row.losses['full']:.2f} on {row.category}" for row in rows]
        return [f"The full model's loss is {_listed(full)}, in nats; nothing was removed."]
    if not record.steps:
        return ["Nothing trained yet."]
    last = record.steps[-1]
    of = f" of {record.config.train.steps}" if record.config else ""
    return [f"Not evaluated yet: {last['step']}{of} steps trained, training loss {last['loss']:.2f} nats."]


def signed(difference: float, digits: int) -> str:
    """'+3.21', '−0.02' with a minus sign as wide as the plus."""
    return f"{difference:+.{digits}f}".replace("-", "−")


def _removal(condition: str, rows: list[LossRow]) -> str:
    domains = removed_domains(condition)
    rows = [row for row in rows if condition in row.losses]
    forgotten = [row for row in rows if is_forgotten(row.true_label, domains)]
    kept = [row for row in rows if row not in forgotten]
    changes = [(row.category, row.difference(condition), "") for row in forgotten]
    if len(kept) <= NAMED:
        changes += [(row.category, row.difference(condition), "") for row in kept]
    else:
        worst = max(kept, key=lambda row: row.difference(condition))
        mean = sum(row.difference(condition) for row in kept) / len(kept)
        note = f" on average (at most {worst.difference(condition):.2f}, on {worst.category})"
        changes.append((f"the {len(kept)} other categories", mean, note))
    removed = _listed([f"`{domain}`" for domain in domains])
    return f"Removing {removed} {_listed(_phrases(changes))}." if changes else f"Nothing measured without {removed}."


def _phrases(changes: list[tuple[str, float, str]]) -> list[str]:
    """'raises the loss on es by 3.21 nats', 'on en by 0.02', 'lowers it on fr by 0.10'."""
    phrases: list[str] = []
    previous, what, unit = "", "the loss", " nats"
    for subject, difference, note in changes:
        verb = _verb(difference)
        by = f" by {abs(difference):.2f}{unit}" if verb in ("raises {}", "lowers {}") else ""
        opening = "" if verb == previous else verb.format(what) + " "
        phrases.append(f"{opening}on {subject}{by}{note}")
        previous, what, unit = verb, "it", "" if by else unit
    return phrases


def _verb(difference: float) -> str:
    if not math.isfinite(difference):
        return "makes {} infinite or undefined"
    if abs(difference) < UNCHANGED:
        return "leaves {} unchanged"
    return "raises {}" if difference > 0 else "lowers {}"


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
