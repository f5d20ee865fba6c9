"""What each row of a label channel buys and what it costs, a line a row, wherever a channel is shown.

The facts are those of docs/recipes.md, which has each of the sentences below in its table; which of them hold for a
share follows from the strategy's tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sgtm.masking.channel import LabelChannel
from sgtm.masking.labels import OPEN, RETAIN, UNLABELED
from sgtm_kernels.tables import KINDS, PARTS

if TYPE_CHECKING:
    from sgtm.config.schema import Config

ALONE = "the ablated model is as good on retained data as this share lets it be"
MIXED = (
    "the full model is as good on retained data as this share lets it be, but the safe model depends on the domain, "
    "and where this is most of the text the groups out-shout one another and learning stalls"
)
LIVED_WITH = (
    "the domain's group learns to live with retained data, but the retain group learns nothing from these tokens"
)
NEVER_SEEN = "the group never runs on retained data, so the full model is worse on them than the ablated one"
TWICE = "documents trained both ways cost their tokens twice"
DOMAIN_ALONE = "only the domain's group learns it"
DOMAIN_AND_MORE = "the domain's group learns it, and what is shared with it keeps a part"
ABSORBS = (
    "the group absorbs documents that the labeller missed, where they are trained as unlabeled, but the safe model "
    "keeps a part of the domain"
)
STAYS = "the retain group learns it, and it stays after the removal"
UNKNOWN = "documents of a domain among them are absorbed by its group, at a price in quality that has to be measured"
UNMASKED = "nothing is masked: a channel changes nothing but how often a document is trained"


def row_lines(config: Config, channel: LabelChannel) -> list[str]:
    """A line for each true label of the channel: what each share of its documents buys and costs."""
    if config.masking.strategy == "none":
        return [UNMASKED]
    lines = []
    for true, name in enumerate(config.space.labels):
        if name.startswith(OPEN):  # no document has it as its true label
            continue
        row = channel.matrix[true]
        shares = [label for label in range(len(row)) if row[label] > 0]
        parts = [f"{row[label]:.0%} as {config.space.labels[label]}: {_trade(config, true, label)}" for label in shares]
        if true == RETAIN:
            never = [domain for domain in config.space.domains if not share_with_group(config, channel, domain)]
            parts += [f"never with {', '.join(never)}: {NEVER_SEEN}"] if never else []
        parts += [TWICE] if row.sum() > 1 + 1e-9 else []
        lines.append(f"{name}: {'; '.join(parts)}")
    return lines


def share_with_group(config: Config, channel: LabelChannel, domain: str) -> float:
    """The share of the retain documents that are trained with the domain's group running, by a channel."""
    active, group = config.tables.active, config.space.group_of(domain)
    return min(1.0, sum(share for label, share in enumerate(channel.matrix[RETAIN]) if active[label][group] != 0))


def most_with_group(config: Config) -> dict[str, float]:
    """By domain, the largest such share of the run's channels."""
    channels = [channel for _, channel in config.channels]
    return {d: float(max(share_with_group(config, channel, d) for channel in channels)) for d in config.space.domains}


def _trade(config: Config, true: int, label: int) -> str:
    tables = config.tables
    runs = [group for group, active in enumerate(tables.active[label]) if group and active != 0]
    learns = any(tables.contribution(part, label, 0) != 0 for part in PARTS)
    if true == RETAIN:
        return (MIXED if learns else LIVED_WITH) if runs else ALONE
    if true == UNLABELED:
        return UNKNOWN if runs else STAYS
    own = config.space.group_of(config.space.labels[true].partition(":")[2])
    if own not in runs:
        return STAYS
    if label not in config.space.forget_labels:
        return ABSORBS
    shared = learns or any(tables.update_joint[kind][label] != 0 for kind in KINDS)
    return DOMAIN_AND_MORE if shared else DOMAIN_ALONE
