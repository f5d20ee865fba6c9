"""`sgtm explain` of many domains: tables by the role of a domain, whose size does not grow with their number.

A table of all labels and groups has a column for each domain: of twenty no terminal shows it, of three no narrow one.
Of K domains each is treated by the presets as the others are, so a row here stands for all rows that are alike: those
of a domain's own label, and of the other domains' labels. Where rows differ, all their values are shown, separated by
slashes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.table import Table

from sgtm.masking.labels import FORGET, OPEN, RETAIN_GROUP
from sgtm.masking.partition import ENDS
from sgtm_kernels.tables import PROJECTIONS

KINDS = (FORGET, OPEN)


def merged(texts: Iterable[str]) -> str:
    """The text that all have, or all different ones."""
    return " / ".join(dict.fromkeys(texts))


def kinds_of(labels: Sequence[str]) -> dict[str, list[int]]:
    """Labels of each kind: `unlabeled` and `retain` by themselves, `forget:` and `open:` of all domains."""
    by_kind: dict[str, list[int]] = {}
    for label, name in enumerate(labels):
        by_kind.setdefault(next((kind for kind in KINDS if name.startswith(kind)), name), []).append(label)
    return by_kind


def forward_table(title: str, labels: Sequence[str], groups: Sequence[str], cell: Callable[[int, int], str]) -> Table:
    """cell  by label and group, what a group does for tokens of the label"""
    table = Table(title=title, title_justify="left")
    for column in ("label", RETAIN_GROUP, "own group", "other groups"):
        table.add_column(column)
    for kind, members in kinds_of(labels).items():
        own: list[str] = []
        others: list[str] = []
        for label in members:
            domain = labels[label].removeprefix(kind)
            for group in range(1, len(groups)):
                (own if groups[group] == domain else others).append(cell(label, group))
        table.add_row(
            _row_name(kind, members), merged(cell(label, 0) for label in members), merged(own), merged(others)
        )
    return table


def updates_table(
    title: str,
    caption: str,
    labels: Sequence[str],
    counts: dict[str, int],
    cell: Callable[[str, int], str],
    joint_name: Callable[[str], str],
) -> Table:
    """counts  parameters by key; cell: by key and label, the weight of a token's contribution"""
    table = Table(title=title, title_justify="left", caption=caption, padding=0)
    table.add_column("parameters", no_wrap=True)
    table.add_column("number", justify="right", no_wrap=True)
    kinds = kinds_of(labels)
    for kind in kinds:
        for name in (f"{kind} own", f"{kind} other") if kind in KINDS else (kind,):
            table.add_column(name, justify="center", overflow="fold")
    alike: dict[tuple[int, str], list[str]] = {}
    for key in counts:
        part, _, group = key.partition(".")
        owner = 0 if group == RETAIN_GROUP else 1 if group else 2
        alike.setdefault((owner, part if group else key), []).append(key)
    before = None
    for (owner, part), keys in sorted(alike.items(), key=lambda item: (item[0][0], _rank(item[0][1]))):
        if before not in (None, owner):
            table.add_section()
        before = owner
        cells = []
        for kind, members in kinds.items():
            pairs = [(key, label) for key in keys for label in members]
            if kind not in KINDS:
                cells.append(merged(cell(*pair) for pair in pairs))
                continue
            mine = [pair for pair in pairs if owner != 1 or pair[0].partition(".")[2] == labels[pair[1]][len(kind) :]]
            others = [pair for pair in pairs if owner != 1 or pair not in mine]
            cells += [merged(cell(*pair) for pair in some) for some in (mine, others)]
        sizes = sorted({counts[key] for key in keys})
        number = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        name = (f"{RETAIN_GROUP} {part}", f"domain {part}", joint_name(part))[owner]
        table.add_row(name, f"{len(keys)} x {number}" if owner == 1 else number, *cells)
    return table


def _row_name(kind: str, members: Sequence[int]) -> str:
    return f"{kind} {len(members)} domains" if kind in KINDS else kind


def _rank(part: str) -> tuple:
    order = (*PROJECTIONS, *ENDS)
    return (order.index(part), part) if part in order else (len(order), part)


def channel_table(title: str, labels: Sequence[str], share: Callable[[int, int], float]) -> Table:
    """share  by true label and label: how much of the documents of the first is trained as the second"""
    table = Table(title=title, title_justify="left")
    table.add_column("true label", no_wrap=True)
    kinds = kinds_of(labels)
    for kind in kinds:
        for name in (f"{kind} own", f"{kind} all other") if kind in KINDS else (kind,):
            table.add_column(name, justify="right")
    for true, members in kinds.items():
        if true == OPEN:  # no corpus has it as a true label
            continue
        rows = []
        for label in members:
            row: list[float] = []
            for kind, targets in kinds.items():
                own = [t for t in targets if labels[t][len(kind) :] == labels[label].removeprefix(true)]
                if kind in KINDS:
                    row.append(sum(share(label, t) for t in own if true in KINDS))
                    row.append(sum(share(label, t) for t in targets if true not in KINDS or t not in own))
                else:
                    row.append(share(label, targets[0]))
            rows.append(row)
        cells = [merged(f"{value:.0%}" if value else "-" for value in column) for column in zip(*rows, strict=True)]
        table.add_row(_row_name(true, members), *cells)
    return table
