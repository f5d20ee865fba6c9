"""Labels and groups: the two alphabets of the method.

A token's *label* is what it is trained as: `unlabeled` (0), `retain` (1), `forget:<domain>` (2, 3, ...), then
`open:<domain>` of the domains that have one: the retain group and the domain's run and learn, other domains' do not
run. A head or neuron belongs to a *group*: `retain` (0), then one group per domain (1, 2, ...).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sgtm.process.names import did_you_mean, look_alike

UNLABELED, RETAIN, FIRST_FORGET = 0, 1, 2
FORGET, OPEN = "forget:", "open:"
MANY = 4  # domains: more are described together and not one by one
RETAIN_GROUP = "retain"
FULL, WITHOUT, WITH, AT = "full", "without ", "with ", " at "
JOINT_GROUP = "joint"  # in the place of a group: all weights that no group owns
RESERVED = ("retain", "unlabeled", FULL, JOINT_GROUP)


def removal_name(removed: Iterable[str]) -> str:
    """`full`, or `without <domain>[,<domain>...]`: the name of a set of removed domains in every output."""
    removed = tuple(removed)
    return WITHOUT + ",".join(removed) if removed else FULL


def removed_domains(name: str) -> tuple[str, ...]:
    """Inverse of `removal_name`."""
    return tuple(name.removeprefix(WITHOUT).split(",")) if name.startswith(WITHOUT) else ()


def strength_name(strengths: Mapping[str, float]) -> str:
    """`with <domain> at <strength>[,...]`: the name of a model with domains at these strengths in every output."""
    return WITH + ",".join(f"{domain}{AT}{strength:g}" for domain, strength in strengths.items())


def lowered_domains(name: str) -> tuple[str, ...]:
    """The domains that a name of `removal_name` or `strength_name` lists: without them, or with less of them."""
    if not name.startswith(WITH):
        return removed_domains(name)
    return tuple(part.rpartition(AT)[0] for part in name.removeprefix(WITH).split(","))


@dataclass(frozen=True)
class LabelSpace:
    """The labels and groups that a list of domains implies.

    opened  domains with a label `open:<domain>`, in any order: a label that no token has costs a column in every table

    Raises ValueError for an empty, duplicated or reserved domain name, and for an open one that is none of the domains.
    """

    domains: tuple[str, ...]
    opened: tuple[str, ...] = ()

    def __post_init__(self):
        for domain in self.opened:
            self.group_of(domain)
        bad = [d for d in self.domains if not d or d != d.strip() or d in RESERVED or ":" in d or "," in d]
        if bad or len(set(self.domains)) != len(self.domains):
            raise ValueError(
                f"masking.domains must be distinct names without ':', ',' or a space at either end, "
                f"none of {', '.join(RESERVED)}; got {list(self.domains)}"
            )

    @property
    def labels(self) -> tuple[str, ...]:
        opened = (f"{OPEN}{domain}" for domain in self.domains if domain in self.opened)
        return ("unlabeled", "retain", *(f"forget:{domain}" for domain in self.domains), *opened)

    @property
    def groups(self) -> tuple[str, ...]:
        return (RETAIN_GROUP, *self.domains)

    @property
    def forget_labels(self) -> range:
        """Labels `forget:<domain>`, in the order of the domains."""
        return range(FIRST_FORGET, FIRST_FORGET + len(self.domains))

    @property
    def open_groups(self) -> dict[int, int]:
        """Group of the domain of every label `open:<domain>`."""
        labels = enumerate(self.labels)
        return {i: self.group_of(name.removeprefix(OPEN)) for i, name in labels if name.startswith(OPEN)}

    def label(self, name: str) -> int:
        """Index of a label; raises ValueError that lists the known ones."""
        if name not in self.labels:
            slip, known = look_alike(name, self.labels), ", ".join(self.labels)
            raise ValueError(f"unknown label {name!r}{slip}; known labels: {known}")
        return self.labels.index(name)

    def group_of(self, domain: str) -> int:
        """Index of a domain's group; raises ValueError that lists the known ones."""
        if domain not in self.domains:
            slip, known = did_you_mean(domain, self.domains), ", ".join(self.domains)
            raise ValueError(f"unknown domain {domain!r}{slip}; known domains: {known}")
        return self.domains.index(domain) + 1

    def removals(self, chosen: Iterable[Iterable[str]] = ()) -> list[tuple[str, ...]]:
        """Sets of domains to remove: none, each domain by itself, those that are `chosen`, and all; each once, smaller
        ones before larger, in the order of the domains. Raises ValueError for an unknown domain.

        So there are at most K + 2 of K domains and those that are chosen, not 2^K.
        """
        every = range(len(self.domains))
        sets = [(), *((index,) for index in every), tuple(every)]
        sets += [tuple(sorted({self.group_of(domain) - 1 for domain in names})) for names in chosen]
        return [tuple(self.domains[i] for i in removed) for removed in sorted(set(sets), key=lambda s: (len(s), s))]
