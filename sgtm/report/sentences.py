"""What happened in a run, in words: the headline of the page."""

from __future__ import annotations

import math

from sgtm.masking.labels import removed_domains
from sgtm.report.findings import UNCHANGED, LossRow, conditions, listed, loss_rows, signed
from sgtm.report.record import Record, is_forgotten

NAMED = 3  # so many kept categories are named in a sentence; more are averaged by true label
KINDS = {"retain": "retain", "unlabeled": "unlabeled", "": "other"}


def sentences(record: Record) -> list[str]:
    """What happened, the first sentence first; code words in backticks."""
    summary = record.summary
    rows = loss_rows(summary)
    found = [_removal(condition, rows) for condition in conditions(summary)]
    if not found and rows:
        full = [f"{row.losses['full']:.2f} on {row.category}" for row in rows]
        found = [f"The full model's loss is {listed(full)}, in nats; nothing was removed."]
    if found:
        return [*found, *_origin(record)]
    if not record.steps:
        return ["Nothing trained yet."]
    last = record.steps[-1]
    of = f" of {record.config.train.steps}" if record.config else ""
    return [f"Not evaluated yet: {last['step']}{of} steps trained, training loss {last['loss']:.2f} nats."]


def _origin(record: Record) -> list[str]:
    """Which evaluation the losses are of, where it is not the whole of `sgtm eval` after the last step."""
    summary = record.summary
    steps, of_steps = summary.get("steps"), summary.get("of_steps")
    of = f" of {of_steps}" if of_steps and of_steps != steps else ""
    if "in_training" in summary:
        sample = f", on up to {n:,} sequences of each category" if (n := summary["in_training"]) else ""
        outdated = f" `summary.json` is of step {old}." if (old := summary.get("summary_steps")) is not None else ""
        return [
            f"These losses are of the evaluation in training after step {steps}{of}{sample}; `sgtm eval {record.run}` "
            f"measures the whole test split and the gradient norms.{outdated}"
        ]
    parts = [f"after step {steps}{of}"] if of else []
    if summary.get("split", "test") != "test":
        parts.append(f"on split {summary['split']}")
    if summary.get("sequences"):
        parts.append(f"on up to {summary['sequences']:,} sequences of each category")
    return [f"These losses were measured {', '.join(parts)}."] if parts else []


def _removal(condition: str, rows: list[LossRow]) -> str:
    """Small test sets are left out, but for those of the removed domains."""
    domains = removed_domains(condition)
    rows = [row for row in rows if condition in row.losses]
    forgotten = [row for row in rows if is_forgotten(row.true_label, domains)]
    kept = [row for row in rows if row not in forgotten and not row.small]
    changes = [_change(row, condition) for row in forgotten]
    if len(kept) <= NAMED:
        changes += [_change(row, condition) for row in kept]
    else:
        by_label: dict[str, list[LossRow]] = {}
        for row in kept:
            by_label.setdefault(row.true_label, []).append(row)
        changes += [_change_of_all(label, of_label, condition) for label, of_label in by_label.items()]
    removed = listed([f"`{domain}`" for domain in domains])
    return f"Removing {removed} {listed(_phrases(changes))}." if changes else f"Nothing measured without {removed}."


def _change(row: LossRow, condition: str) -> tuple[str, float, str]:
    return row.category, row.difference(condition), f" ({row.tokens:,} tokens)" if row.small else ""


def _change_of_all(label: str, rows: list[LossRow], condition: str) -> tuple[str, float, str]:
    """The mean over the tokens of a true label's categories, and the smallest and largest change."""
    if len(rows) == 1:
        return _change(rows[0], condition)
    tokens = [row.tokens for row in rows if row.tokens is not None]
    known = len(tokens) == len(rows)
    weights = tokens if known else [1] * len(rows)
    changes = {row.category: row.difference(condition) for row in rows}
    mean = sum(w * change for w, change in zip(weights, changes.values(), strict=True)) / sum(weights)
    least, most = min(changes, key=changes.__getitem__), max(changes, key=changes.__getitem__)
    spread = f"{signed(changes[least], 2)} on {least} to {signed(changes[most], 2)} on {most}"
    kind = KINDS.get(label, label)
    note = f" ({'' if known else 'a mean that weighs all alike; '}{spread})"
    return f"the {len(rows)} {kind} categories", mean, note


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
