"""The grid of attacks on a run, checked before anything is trained.

A plan is made for one run and applied to others as it is, controls among them, so learning rates are absolute and data
are those of one corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sgtm.config.errors import ConfigError
from sgtm.evaluation.subject import Subject
from sgtm.evaluation.tampering import SCHEDULES, Attack, AttackData, HeldOut, evaluated_steps, held_out
from sgtm.process.names import did_you_mean
from sgtm.run.evaluate import count_sequences
from sgtm.run.opened import OpenedRun
from sgtm.words import listed

FORGET, MIXED, ADJACENT = "forget", "forget+retain", "adjacent"
BUDGETS = (16, 64, 256)
MULTIPLES = (0.1, 0.25, 1.0, 3.0)
SEQUENCES = 64  # of each category, held out


@dataclass(frozen=True)
class Plan:
    """Attacks on a run, and what is measured.

    domains         those to win back
    forget, retain  categories whose held-out losses are taken
    sequences       of each of them, at most
    """

    domains: tuple[str, ...]
    forget: tuple[str, ...]
    retain: tuple[str, ...]
    sequences: int
    attacks: tuple[Attack, ...]

    def measure(self, subject: Subject) -> HeldOut:
        return held_out(subject, self.forget, self.retain, sequences=self.sequences)


def make_plan(
    target: OpenedRun,
    *,
    domains: Sequence[str] | None = None,
    data: Sequence[str] = (FORGET, MIXED),
    adjacent: Sequence[str] = (),
    multiples: Sequence[float] = MULTIPLES,
    schedules: Sequence[str] = SCHEDULES,
    budgets: Sequence[int] = BUDGETS,
    tokens: int | None = None,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    sequences: int = SEQUENCES,
    seed: int = 0,
) -> Plan:
    """The grid of attacks on a run: every mixture of data with every schedule and learning rate.

    domains    to win back; None: the only one of the run
    data       of the mixtures FORGET, MIXED and ADJACENT; adjacent: categories of the last
    multiples  learning rates as multiples of the run's own peak
    budgets    numbers of steps: a cosine runs once for each; one constant run of the most stands for all
    tokens     of a step; None: as many as the run itself took
    warmup     share of the steps; of the constant runs' it is that of the smallest budget, as that is read off them too

    Raises ValueError for what the run or its corpus does not have, and for numbers that make no attack.
    """
    domains = _domains(target, domains)
    labels = {f"forget:{domain}" for domain in domains}
    forget, retain = (
        tuple(name for name, label in target.corpus.categories.items() if label in wanted)
        for wanted in (labels, {"retain"})
    )
    checks = (
        ("--steps", list(budgets), "one or more numbers above 0", bool(budgets) and min(budgets) >= 1),
        ("--lr", list(multiples), "one or more multiples of the run's peak rate", bool(multiples)),
        ("--warmup", warmup, "a share from 0 to below 1", 0 <= warmup < 1),
        ("--seed", seed, "0 or more", seed >= 0),
        ("--sequences", sequences, "1 or more", sequences >= 1),
    )
    for name, value, takes, fits in checks:
        if not fits:
            raise ValueError(f"{name} {value}: give {takes}")
    longest, lr = max(budgets), target.config.optimizer.lr
    attacks = [
        Attack(
            data=name,
            parts=parts,
            lr=multiple * lr,
            schedule=schedule,
            steps=steps,
            warmup=int(warmup * (min(budgets) if schedule == "constant" else steps)),
            tokens=tokens or target.config.train.tokens_per_step,
            evaluated=evaluated_steps(steps, budgets),
            weight_decay=weight_decay,
            seed=seed,
        )
        for name, parts in _mixtures(target, data, forget, retain, adjacent).items()
        for schedule in dict.fromkeys(schedules)
        for multiple in dict.fromkeys(multiples)
        for steps in ([longest] if schedule == "constant" else sorted(set(budgets)))
    ]
    for attack in {attack.parts: attack for attack in attacks}.values():
        AttackData(target.corpus, target.config, attack)
    measured = [tuple(name for name in names if _has_text(target, "test", name)) for names in (forget, retain)]
    if not measured[0]:
        raise ValueError(
            f"split test of {target.corpus.path} has nothing of {listed(forget)} to measure {listed(domains)} by; hold "
            f"documents out when the data are prepared"
        )
    return Plan(domains, measured[0], measured[1], sequences, tuple(attacks))


def _has_text(target: OpenedRun, split: str, category: str) -> bool:
    return count_sequences(target.corpus, target.config, split, category, 1) > 0


def _domains(target: OpenedRun, domains: Sequence[str] | None) -> tuple[str, ...]:
    known = target.removable or target.config.masking.domains
    for domain in domains or ():
        if domain not in known:
            slip = did_you_mean(domain, known)
            raise ConfigError(
                f"{target.run} has no domain {domain!r}{slip}; it has {listed(known) if known else 'none'}"
            )
    if not known:
        raise ConfigError(f"{target.run} has no domain that could be won back")
    if not domains and len(known) > 1:
        raise ConfigError(f"{target.run} has the domains {listed(known)}; choose which to win back: --domain NAME")
    return tuple(dict.fromkeys(domains or known))


def _mixtures(
    target: OpenedRun, data: Sequence[str], forget: tuple[str, ...], retain: tuple[str, ...], adjacent: Sequence[str]
) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Parts of every mixture of data; a domain's categories without text to train on are left out."""
    corpus = target.corpus
    for category in adjacent:
        if category not in corpus.categories:
            slip = did_you_mean(category, corpus.categories)
            raise ConfigError(
                f"{corpus.path} has no category {category!r}{slip}; its categories are {listed([*corpus.categories])}"
            )
        if corpus.categories[category] in {corpus.categories[name] for name in forget}:
            raise ConfigError(f"--adjacent {category}: that is a category of the domain itself, which is --data forget")
    if (ADJACENT in data) != bool(adjacent):
        raise ConfigError("the mixture adjacent and categories for it (--adjacent CATEGORY) go together; give both")
    forget, retain = (tuple(name for name in names if _has_text(target, "train", name)) for names in (forget, retain))
    parts = {FORGET: (forget,), MIXED: (forget, retain), ADJACENT: (tuple(dict.fromkeys(adjacent)),)}
    if unknown := [name for name in data if name not in parts]:
        raise ConfigError(f"unknown data of an attack: {listed(unknown)}; known: {listed([*parts])}")
    for name in data:
        if not all(parts[name]):
            raise ConfigError(f"split train of {corpus.path} lacks text to attack with on {name}; choose other --data")
    return {name: parts[name] for name in dict.fromkeys(data)}
