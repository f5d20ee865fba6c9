"""What an evaluation has found: the table of losses, the warnings, and the headline in words.

Page and terminal show the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sgtm.data.summary import FEW_TOKENS
from sgtm.evaluation import effects
from sgtm.evaluation.effects import MANY
from sgtm.masking.labels import FORGET, FULL, lowered_domains, removed_domains
from sgtm.report.record import RunRecord, is_forgotten
from sgtm.run.adapted import described_adapters
from sgtm.run.unlearned import described
from sgtm.words import counted, listed

UNCHANGED = 0.005  # nats: below this a difference prints as 0.00
DISTURBED = 0.05  # nats, of a domain by the group of another: below this there is nothing to mend
CERTAIN = 2.0  # standard errors
SMALL = f"fewer than {FEW_TOKENS:,} tokens were measured"
NAMED = 3  # so many kept categories are named in a sentence; more are averaged by true label
ADJECTIVES = {"retain": "retain", "unlabeled": "unlabeled", "": "other"}


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
    """Keys of the losses but `full`: sets of removed domains, smaller ones first, then domains at strengths."""
    keys = [key for key in summary.get("losses", {}) if key != FULL]
    return sorted(keys, key=lambda key: (not removed_domains(key), len(lowered_domains(key))))


@dataclass(frozen=True)
class SetRow:
    """One condition of an evaluation with many: mean losses by true label, over the tokens of its categories.

    changes  differences to the full model; empty for the full model itself
    meant    true labels whose loss the condition is meant to raise
    """

    condition: str
    name: str
    losses: dict[str, float]
    changes: dict[str, float]
    meant: tuple[str, ...]


def set_rows(summary: dict) -> list[SetRow]:
    """A row for each condition, the full model first; none where there are few, whose losses are all shown."""
    if len(conditions(summary)) <= MANY:
        return []
    true, tokens = summary.get("true_labels", {}), _measured(summary)
    domains = [label for label in dict.fromkeys(true.values()) if label.startswith(FORGET)]
    retained = [label for label in dict.fromkeys(true.values()) if label not in domains]
    rows: list[SetRow] = []
    for condition in (FULL, *conditions(summary)):
        means = effects.by_true_label(summary["losses"][condition], true, tokens)
        losses = {label: means[label] for label in (*retained, *domains) if label in means}
        full = rows[0].losses if rows else {}
        changes = {label: loss - full[label] for label, loss in losses.items() if label in full}
        meant = tuple(f"{FORGET}{domain}" for domain in lowered_domains(condition))
        rows.append(SetRow(condition, effects.short_name(condition, len(domains)), losses, changes, meant))
    return rows


def _measured(summary: dict) -> dict[str, int]:
    """Tokens by category, where they were recorded."""
    known = {category: measured_tokens(summary, category) for category in summary.get("losses", {}).get(FULL, {})}
    return {category: tokens for category, tokens in known.items() if tokens is not None}


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
            tokens=measured_tokens(summary, category),
        )
        for category in summary.get("losses", {}).get("full", {})
    ]
    return sorted(rows, key=lambda row: row.true_label.startswith("forget:"))


def measured_tokens(summary: dict, category: str) -> int | None:
    """Tokens that the losses rest on: the targets, fewer than there are in the split, as a token without one before it
    is none. Of an older record those of the split, if all of it was measured; else None.
    """
    nothing = {"tokens": 0}
    if "measured" in summary:
        return summary["measured"].get(category, nothing)["tokens"]
    everything = summary.get("sequences") is None and "in_training" not in summary
    of_split = summary.get("counts", {}).get(summary.get("split"))
    return of_split.get(category, nothing)["tokens"] if everything and of_split is not None else None


def cautions(summary: dict) -> list[str]:
    """Cautions for a reader of the losses; code words in backticks."""
    rows = loss_rows(summary)
    lines = [described(summary["unlearned"])] if "unlearned" in summary else []
    lines += [described_adapters(summary["adapted"])] if "adapted" in summary else []
    worse = [
        sentence for condition in conditions(summary) for sentence in _worse_than_ablated(summary, rows, condition)
    ]
    lines += worse if len(worse) <= MANY else [worse[0], f"So it is with {len(worse) - 1} other domains."]
    lines += _worse_on_other_domains(rows, conditions(summary))
    if small := [f"{row.category} ({row.tokens:,})" for row in rows if row.small]:
        lines.append(f"In grey: {listed(small)}; {SMALL}, so these losses are not reliable.")
    return lines


def _worse_than_ablated(summary: dict, rows: list[LossRow], condition: str) -> list[str]:
    """Where the full model is worse on retained data than its own ablated one, beyond chance, and why."""
    worse: list[str] = []
    for row in rows:
        if row.true_label == "retain" and condition in row.losses and not row.small:
            by, error = -row.difference(condition), row.difference_errors.get(condition, 0.0)
            worse += [f"{by:.2f} nats on {row.category}"] if by >= max(UNCHANGED, CERTAIN * error) else []
    domains = removed_domains(condition)
    if not worse or len(domains) != 1:  # several removed: each of them has its own sentence
        return []
    if "adapted" in summary:
        remedy = "train them with a larger `--retain-weight`, or a lower `--lr`"
        return [f"The adapters make the model worse on retained data, by {listed(worse)}; {remedy}."]
    steering = summary.get("steering", {})
    if steering.get("domain") == domains[0] and steering["strength"]:
        return [
            f"The direction of `{domains[0]}`, which is added to every token, makes the model worse on retained data, "
            f"by {listed(worse)}; a `steering.strength` closer to 0 than {steering['strength']:g} adds less."
        ]
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


def _worse_on_other_domains(rows: list[LossRow], removals: list[str]) -> list[str]:
    """Where a domain's group makes the full model worse on another domain's data, beyond chance: all in a sentence."""
    worse: dict[str, float] = {}
    for row in rows:
        for condition in (each for each in removals if len(removed_domains(each)) == 1):
            others = row.true_label.startswith(FORGET) and row.true_label != FORGET + removed_domains(condition)[0]
            if others and condition in row.losses and not row.small:
                nats, error = -row.difference(condition), row.difference_errors.get(condition, 0.0)
                if nats >= max(DISTURBED, CERTAIN * error):
                    worse[row.category] = max(nats, worse.get(row.category, 0.0))
    if not worse:
        return []
    most = listed([f"{nats:.2f} nats on {category}" for category, nats in list(worse.items())[:MANY]])
    more = f", and on {len(worse) - MANY} other categories" if len(worse) > MANY else ""
    return [
        f"The full model is worse on a domain's data than the model without another domain, by up to {most}{more}: "
        f"these groups disturb one another where they run together. Remedy: train a larger share of each row of "
        f"`data.channel` as `unlabeled`, where all groups run, as `recipe: dual` does."
    ]


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
            sentences.append(f"The gradient of {label} data is {times} times as strong on {own} as on {group}.")
    return sentences


def signed(difference: float, digits: int) -> str:
    """'+3.21', '−0.02' with a minus sign as wide as the plus."""
    return f"{difference:+.{digits}f}".replace("-", "−")


def error_of(error: float) -> str:
    """'0.012'; one that would round to 0 is shown as 0.001."""
    return f"{max(error, 1e-3) if error else 0:.3f}"


def sentences(record: RunRecord) -> list[str]:
    """What happened, the first sentence first; code words in backticks."""
    summary = record.summary
    rows = loss_rows(summary)
    many = len(conditions(summary)) > MANY
    lines = [] if many else [_removal(condition, rows) for condition in conditions(summary)]
    lines += effects.described(summary["losses"], summary.get("true_labels", {}), _measured(summary)) if many else []
    if not lines and rows:
        full = [f"{row.losses['full']:.2f} on {row.category}" for row in rows]
        unmasked = record.config is not None and not any(record.config.removals)
        why = ", as no group of a model that was trained without masks holds a domain" if unmasked else ""
        lines = [f"The full model's loss is {listed(full)}, in nats; nothing was removed{why}."]
    if lines:
        return [*lines, *_origin(record)]
    if not record.steps:
        return ["Nothing trained yet."]
    last = record.steps[-1]
    of = f" of {record.config.train.steps}" if record.config else ""
    done = f"{last['step']}{of} steps" if of else counted(last["step"], "step")
    return [f"Not evaluated yet: {done} trained, training loss {last['loss']:.2f} nats."]


def _origin(record: RunRecord) -> list[str]:
    """Which evaluation the losses are of, where it is not the whole of `sgtm eval` after the last step."""
    summary = record.summary
    steps, of_steps = summary.get("steps"), summary.get("of_steps")
    of = f" of {of_steps}" if of_steps and of_steps != steps else ""
    if "in_training" in summary:
        limit = summary["in_training"]  # a number, all, or None where no config says it
        sample = f", on up to {counted(limit, 'sequence')} of each category" if isinstance(limit, int) else ""
        more = "" if limit == "all" else "the whole test split and "
        outdated = f" `summary.json` is of step {old}." if (old := summary.get("summary_steps")) is not None else ""
        return [
            f"These losses are of the evaluation in training after step {steps}{of}{sample}; `sgtm eval {record.run}` "
            f"measures {more}the gradient norms.{outdated}"
        ]
    parts = [f"after step {steps}{of}"] if of else []
    if summary.get("split", "test") != "test":
        parts.append(f"on split {summary['split']}")
    if summary.get("sequences"):
        parts.append(f"on up to {counted(summary['sequences'], 'sequence')} of each category")
    return [f"These losses were measured {', '.join(parts)}."] if parts else []


def _removal(condition: str, rows: list[LossRow]) -> str:
    """Small test sets are left out, but for those of the domains that are removed, or at a strength."""
    domains = lowered_domains(condition)
    rows = [row for row in rows if condition in row.losses]
    forgotten = [row for row in rows if is_forgotten(row.true_label, domains)]
    others = [row for row in rows if row not in forgotten and not row.small]
    changes = [_change(row, condition) for row in forgotten]
    if len(others) <= NAMED:
        changes += [_change(row, condition) for row in others]
    else:
        by_label: dict[str, list[LossRow]] = {}
        for row in others:
            by_label.setdefault(row.true_label, []).append(row)
        changes += [_change_of_all(label, of_label, condition) for label, of_label in by_label.items()]
    if not removed_domains(condition):
        what = f"The model {condition}"
        return f"{what} {listed(_phrases(changes))}." if changes else f"Nothing measured {condition}."
    removed = listed([f"`{domain}`" for domain in domains])
    return f"Removing {removed} {listed(_phrases(changes))}." if changes else f"Nothing measured without {removed}."


def _change(row: LossRow, condition: str) -> tuple[str, float, str]:
    return row.category, row.difference(condition), f" ({counted(row.tokens or 0, 'token')})" if row.small else ""


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
    adjective = ADJECTIVES.get(label, label)
    note = f" ({'' if known else 'a mean that weighs all alike; '}{spread})"
    return f"the {len(rows)} {adjective} categories", mean, note


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
