"""The label channel: from what a document is to what it is trained as.

One matrix of P(applied | true), drawn once per document from a hash of (seed, document id), covers label noise (recall,
false positives, undiscovered forget data), the share of retain data trained in retain mode, GRAM's auxiliary spread and
core share, and documents that are trained twice, under two labels. The draw never depends on order, process or library
version.

`row_lines` describes in a line what each row of a channel buys and costs, wherever a channel is shown.

The facts are those of docs/recipes.md, which has each of the sentences below in its table; which of them hold for a
share follows from the strategy's tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sgtm.masking.labels import FORGET, MANY, OPEN, RETAIN, UNLABELED, LabelSpace
from sgtm_kernels.tables import JOINT_KINDS, PROJECTIONS, Tables

ALONE = "the ablated model is as good on retained data as this share lets it be"
MIXED = (
    "the full model is as good on retained data as this share lets it be, but the safe model depends on the domain, "
    "and where this is most of the text the groups out-shout one another and learning stalls"
)
LIVED_WITH = (
    "the domain's group learns to live with retained data, but the retain group learns nothing from these tokens"
)
NEVER_SEEN = "the group never runs on retained data, so the full model is worse on them than the ablated one"
NEVER_TOGETHER = "these data never train all groups together, so the full model is a combination that was not trained"
TWICE = "documents trained both ways cost their tokens twice"
DOMAIN_ALONE = "only the domain's group learns it"
DOMAIN_AND_MORE = "the domain's group learns it, and what is shared with it keeps a part"
ABSORBS = (
    "the group absorbs documents that the labeller missed, where they are trained as unlabeled, but the safe model "
    "keeps a part of the domain"
)
STAYS = "the retain group learns it, and it stays after the removal"
UNKNOWN = "documents of a domain among them are absorbed by its group, at a price in quality that has to be measured"
UNMASKED = (
    "nothing is masked: a channel changes nothing but how often a document is trained, and what data.token_filter takes"
)


@dataclass(frozen=True, eq=False)
class LabelChannel:
    """`matrix[true, applied]`: float64 [labels, labels], rows of shares between 0 and 1 that sum to 1 or more.

    A row of sum s trains each of its documents s times on average: with the draw u of a document in [0, 1), the labels
    are those in which u, u + 1, u + 2, ... below s fall when the shares are laid end to end. With `retain: 1,
    forget:es: 0.2` every document is trained as retain, and a fifth of them as `forget:es` as well.

    Raises ValueError for any other shape or row.
    """

    matrix: np.ndarray

    def __post_init__(self):
        m = self.matrix
        square = m.ndim == 2 and m.shape[0] == m.shape[1]
        if not square or (m < 0).any() or (m > 1).any() or (m.sum(1) < 1 - 1e-9).any():
            raise ValueError(
                f"a label channel is a square matrix of shares, rows summing to 1 or more, got {m.tolist()}"
            )

    @classmethod
    def from_rows(cls, space: LabelSpace, rows: dict[str, dict[str, float]], both_ways: bool = False) -> LabelChannel:
        """Identity, but for the rows given as {true label: {applied label: share}}.

        What a row leaves out stays with the true label if it is not named, else the row must sum to 1.
        both_ways  a row may also sum to more than 1
        Raises ValueError naming the row that does not.
        """
        matrix = np.eye(len(space.labels))
        for true, row in rows.items():
            t = space.label(true)
            values = np.zeros(len(space.labels))
            for applied, p in row.items():
                values[space.label(applied)] = p
            if true not in row:
                values[t] = max(0.0, 1 - values.sum())
            total = values.sum()
            if (values < 0).any() or (values > 1).any() or total < 1 - 1e-9 or (total > 1 + 1e-9 and not both_ways):
                raise ValueError(
                    f"label channel row {true!r}: {row} must be probabilities that sum to 1"
                    f"{' or more' if both_ways else ' (or more, with data.both_ways)'}"
                )
            matrix[t] = values
        return cls(matrix)

    def apply(self, true_labels: np.ndarray, document_ids: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Which documents are trained, and as what.

        true_labels, document_ids  int64 [documents]
        Returns int64 [n] positions in these arrays, ascending first passes before second ones, and int64 [n] labels.
        """
        draws, true_labels = uniform_hash(document_ids, seed), np.asarray(true_labels)
        edges = np.cumsum(self.matrix, axis=1)
        # A cumulative sum of 0.9999... must not leak a draw into the next label.
        whole = np.round(edges)
        edges = np.where(abs(edges - whole) < 1e-9, whole, edges)
        positions, labels = [], []
        for nth in range(int(np.ceil(edges[:, -1].max(initial=1)))):
            chosen = np.flatnonzero(draws + nth < edges[true_labels, -1])
            positions.append(chosen)
            labels.append(((draws[chosen] + nth)[:, None] >= edges[true_labels[chosen]]).sum(1))
        return np.concatenate(positions), np.concatenate(labels).astype(np.int64)


def uniform_hash(ids: np.ndarray, seed: int) -> np.ndarray:
    """float64 in [0, 1) for each integer id: SplitMix64's finaliser over (seed, id) (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        z = np.asarray(ids).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64((seed * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def row_lines(channel: LabelChannel, tables: Tables, strategy: str) -> list[str]:
    """A line for each true label of the channel: what each share of its documents buys and costs.

    tables  of the strategy
    """
    if strategy == "none":
        return [UNMASKED]
    lines = []
    for true, name in enumerate(tables.labels):
        if name.startswith(OPEN):  # no document has it as its true label
            continue
        row = channel.matrix[true]
        parts = _parts(tables, true, row)
        if true == RETAIN:
            never = [domain for domain, share in shares_with_group(channel, tables).items() if not share]
            parts += [f"never with {', '.join(never)}: {NEVER_SEEN}"] if never else []
        if name != "unlabeled" and len(tables.groups) > 2 and not _together(tables, row):
            parts.append(f"as no label with all groups: {NEVER_TOGETHER}")
        parts += [TWICE] if row.sum() > 1 + 1e-9 else []
        lines.append(f"{name}: {'; '.join(parts)}")
    return lines if len(tables.groups) <= MANY + 1 else _alike(lines)


def _together(tables: Tables, row: np.ndarray) -> bool:
    """Whether documents of this row are trained with all groups running."""
    return any(all(active) for active, share in zip(tables.active, row, strict=True) if share > 0)


def _alike(lines: list[str]) -> list[str]:
    """The lines; those of domains that differ in the domain's name alone are one."""
    counts: dict[str, list[str]] = {}
    for line in lines:
        domain = line.removeprefix(FORGET).partition(": ")[0] if line.startswith(FORGET) else ""
        counts.setdefault(line.replace(f":{domain}:", ":<domain>:") if domain else line, []).append(line)
    return [f"{line} ({len(of)} domains)" if len(of) > 1 else of[0] for line, of in counts.items()]


def _parts(tables: Tables, true: int, row: np.ndarray) -> list[str]:
    """A part for each label that documents are trained as; labels of many domains that are alike have one."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for label, name in enumerate(tables.labels):
        if row[label] > 0:
            kind = name.partition(":")[0]
            alike.setdefault((f"{row[label]:.0%}", kind, _trade(tables, true, label)), []).append(name)
    parts = []
    for (share, kind, trade), names in alike.items():
        if len(names) > MANY:
            parts.append(f"{share} as {kind}:<domain> for each of {len(names)} domains: {trade}")
        else:
            parts += [f"{share} as {name}: {trade}" for name in names]
    return parts


def shares_with_group(channel: LabelChannel, tables: Tables) -> dict[str, float]:
    """By domain, the share of the retain documents that a channel trains with the domain's group running."""
    shares = {}
    for group, domain in enumerate(tables.groups[1:], 1):
        running = [share for row, share in zip(tables.active, channel.matrix[RETAIN], strict=True) if row[group] != 0]
        shares[domain] = min(1.0, float(sum(running)))
    return shares


def most_with_group(channels: Sequence[tuple[int, LabelChannel]], tables: Tables) -> dict[str, float]:
    """By domain, the largest such share of a run's channels, which come with their first steps."""
    by_channel = [shares_with_group(channel, tables) for _, channel in channels]
    return {domain: max(shares[domain] for shares in by_channel) for domain in tables.groups[1:]}


def _trade(tables: Tables, true: int, label: int) -> str:
    runs = [group for group, active in enumerate(tables.active[label]) if group and active != 0]
    learns = any(tables.contribution(projection, label, 0) != 0 for projection in PROJECTIONS)
    if true == RETAIN:
        return (MIXED if learns else LIVED_WITH) if runs else ALONE
    if true == UNLABELED:
        return UNKNOWN if runs else STAYS
    own = tables.groups.index(tables.labels[true].partition(":")[2])
    if own not in runs:
        return STAYS
    if not tables.labels[label].startswith("forget:"):
        return ABSORBS
    shared = learns or any(tables.update_joint[kind][label] != 0 for kind in JOINT_KINDS)
    return DOMAIN_AND_MORE if shared else DOMAIN_ALONE
