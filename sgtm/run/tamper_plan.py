"""What a run is attacked with: the run, its corpus and the grid of attacks, checked before anything is trained.

A plan is made for one run and applied to others as it is, controls among them, so learning rates are absolute and data
are those of one corpus.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sgtm.config import Config
from sgtm.config.errors import ConfigError
from sgtm.data.loader import isolates_documents
from sgtm.data.store import Corpus
from sgtm.data.trained import trained_tokens
from sgtm.distributed.env import device_type, use_deterministic_algorithms
from sgtm.evaluation.subject import Subject
from sgtm.evaluation.tampering import SCHEDULES, Attack, AttackData, HeldOut, evaluated_steps, held_out
from sgtm.process.names import did_you_mean
from sgtm.run.adapters import adapted_domain
from sgtm.run.checkpoint import open_run, read_manifest
from sgtm.run.evaluate import check_precision, count_sequences, load_model, open_run_corpus
from sgtm.words import listed

FORGET, MIXED, ADJACENT = "forget", "forget+retain", "adjacent"
BUDGETS = (16, 64, 256)
MULTIPLES = (0.1, 0.25, 1.0, 3.0)
SEQUENCES = 64  # of each category, held out


@dataclass(frozen=True)
class AttackedRun:
    """A run that is attacked or examined, or whose full model is measured.

    weights  digest of the checkpoint's files
    """

    run: Path
    config: Config
    checkpoint: Path
    corpus: Corpus
    weights: str

    @property
    def removable(self) -> tuple[str, ...]:
        """Domains without which there is a model: one in adapters, else those with a group; none without masks."""
        if (domain := adapted_domain(self.checkpoint)) is not None:
            return (domain,)
        return tuple(self.config.masking.domains) if self.config.removals[1:] else ()

    def removed(self, domains: Sequence[str]) -> tuple[str, ...]:
        """What an attacker gets the model without: the domains, or nothing of a model trained without masks; of an
        adapted run the one in adapters, where it is among them.
        """
        if adapted_domain(self.checkpoint) is not None:
            return tuple(domain for domain in domains if domain in self.removable)
        return () if self.config.removals == [()] else tuple(domains)

    def subject(self, removed: Sequence[str]) -> Subject:
        """In fp32; removed: as `removed` gives it. The self-check of the kernels comes first, as in an evaluation."""
        if device_type() == "cuda" and self.config.kernels.deterministic:
            use_deterministic_algorithms()
        check_precision(self.config, "fp32")
        base = bool(removed) and adapted_domain(self.checkpoint) is not None
        model = load_model(self.config, self.checkpoint, adapters=not base)
        return Subject(model, self.corpus, self.config, () if base else tuple(removed))


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


def open_target(run: str | Path, data: str | None = None) -> AttackedRun:
    """The newest whole checkpoint of a run, with its corpus; data: `data.path` to take instead of the run's.

    Raises ValueError for a folder that is no run, one without checkpoint, and a corpus that is gone or another one.
    """
    run = Path(run)
    config, checkpoint = open_run(run, data)
    manifest = read_manifest(checkpoint)
    weights = hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()
    return AttackedRun(run, config, checkpoint, open_run_corpus(config, run, manifest), weights)


def check_comparable(target: AttackedRun, other: AttackedRun) -> None:
    """Raises ValueError unless losses of the two runs are of the same sequences."""
    if target.corpus.fingerprint != other.corpus.fingerprint:
        raise ValueError(
            f"{other.run} was trained on {other.corpus.path}, {target.run} on {target.corpus.path}: losses are "
            f"compared on one corpus; leave categories out of a run with data.upsample"
        )
    settings = [(t.config.model.context, isolates_documents(t.config.data)) for t in (target, other)]
    if settings[0] != settings[1]:
        raise ValueError(
            f"{other.run} has model.context {settings[1][0]}{' and isolated documents' * settings[1][1]}, {target.run} "
            f"{settings[0][0]}{' and isolated documents' * settings[0][1]}: their losses are of other sequences; train "
            f"the second with the settings of the first"
        )


def knowing_control(control: AttackedRun, domains: Sequence[str]) -> str:
    """A warning where a run that stands for a model without the domains was trained on them; else empty."""
    for domain in domains:
        trained = trained_tokens(control.corpus, control.config).get(f"forget:{domain}", {})
        if tokens := round(sum(trained.values())):
            return (
                f"the control {control.run} was trained on {tokens:,} tokens of {domain}: it does not show what a "
                f"model without {domain} gives"
            )
    return ""


def make_plan(
    target: AttackedRun,
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
        ("budgets", list(budgets), "one or more numbers of steps above 0", bool(budgets) and min(budgets) >= 1),
        ("multiples", list(multiples), "one or more learning rates", bool(multiples)),
        ("warm-up", warmup, "a share from 0 to below 1", 0 <= warmup < 1),
        ("seed", seed, "0 or more", seed >= 0),
        ("sequences", sequences, "1 or more", sequences >= 1),
    )
    for name, value, takes, fits in checks:
        if not fits:
            raise ValueError(f"a grid of attacks: {name} {value}; it takes {takes}")
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


def _has_text(target: AttackedRun, split: str, category: str) -> bool:
    return count_sequences(target.corpus, target.config, split, category, 1) > 0


def _domains(target: AttackedRun, domains: Sequence[str] | None) -> tuple[str, ...]:
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
    target: AttackedRun, data: Sequence[str], forget: tuple[str, ...], retain: tuple[str, ...], adjacent: Sequence[str]
) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Parts of every mixture of data; a domain's categories without text to train on are left out."""
    corpus = target.corpus
    for category in adjacent:
        if category not in corpus.categories:
            slip = did_you_mean(category, corpus.categories)
            raise ConfigError(
                f"{corpus.path} has no category {category!r}{slip}; its categories are {listed([*corpus.categories])}"
            )
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
