"""Worst-case tamper curves: how soon fine-tuning wins a removed domain back.

An attacker has the ablated model and fine-tunes it on data of the domain. Removed groups are inactive in the forward
pass (`removal_tables`), so that their rows, and the domain's own part of embedding and head, get no gradient and are
frozen: what an attack trains is what an export holds, and no attack can use what was removed. All else is trained, in
fp32, with AdamW.

What counts is the worst case. A single learning rate makes any defence look good, so a grid of attacks is run, and the
worst case at a budget of n steps is the lowest held-out loss on forget data that any of them has reached by step n.
Choosing the lowest of many losses on the same documents favours the attacker a little.

A loss that falls shows neither that the domain was hidden nor that it was taught by the attack. The same grid on a
model that never saw the domain shows what is taught (the control of arXiv 2506.00688).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from sgtm.config.schema import Config
from sgtm.config.sections import OptimizerConfig
from sgtm.data.batch import IGNORE, Batch
from sgtm.data.loader import collate
from sgtm.data.shuffled_sequences import ShuffledSequences
from sgtm.data.store import Corpus
from sgtm.distributed.optim import SegmentedAdamW
from sgtm.distributed.segments import Fragment, segment_tables
from sgtm.evaluation.estimates import Estimate, by_document, of_documents
from sgtm.evaluation.losses import standard_error
from sgtm.evaluation.subject import Subject
from sgtm.model.rows import live_keys

SCHEDULES = ("constant", "cosine")
_ORDER = 7  # purpose of a seed: the order of an attack's sequences


@dataclass(frozen=True)
class Attack:
    """One fine-tuning of an ablated model.

    data          name of the mixture in tables
    parts         categories of the training split; each step has equal shares of every part (of a rest, the first parts
                  one sequence more), and a part's categories come in proportion to their sequences
    lr            peak of the learning rate
    schedule      `constant`, or `cosine` to 0, which the step after the last would have
    steps         updates
    warmup        steps of a linear warm-up, fewer than `steps`
    tokens        of a step, a multiple of the model's context
    evaluated     steps at which held-out losses are taken, ascending, from 0 to `steps`
    weight_decay  of matrices and embeddings
    clip          largest norm of the whole gradient; 0: no clipping
    seed          of the order of the data

    Raises ValueError for values that make no attack.
    """

    data: str
    parts: tuple[tuple[str, ...], ...]
    lr: float
    schedule: str
    steps: int
    warmup: int
    tokens: int
    evaluated: tuple[int, ...]
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.lr < math.inf:
            raise ValueError(f"the learning rate of an attack is a number above 0, got {self.lr}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r} of an attack; known: {', '.join(SCHEDULES)}")
        if self.steps < 1 or not 0 <= self.warmup < self.steps:
            raise ValueError(f"an attack has a step or more after its warm-up, got {self.warmup} of {self.steps}")
        if not (0 <= self.weight_decay < math.inf and 0 <= self.clip < math.inf):
            raise ValueError(
                f"weight_decay and clip of an attack are 0 or more, got {self.weight_decay} and {self.clip}"
            )
        if not self.parts or not all(self.parts):
            raise ValueError(f"an attack needs data: {self.data} has no category")

    def __str__(self) -> str:
        """Constant attacks that differ in their steps alone have one name: the shorter is the start of the longer."""
        constant = self.schedule == "constant"
        words = [self.data, self.schedule if constant else f"{self.schedule} over {self.steps}", f"lr {self.lr:g}"]
        if self.warmup != (1 if constant else self.steps // 10):
            words.append(f"warm-up {self.warmup}")
        words += [f"weight decay {self.weight_decay:g}"] * (self.weight_decay != 0)
        words += [f"clip {self.clip:g}"] * (self.clip != 1) + [f"seed {self.seed}"] * (self.seed != 0)
        return ", ".join(words)

    def learning_rate(self, step: int) -> float:
        """Return those of update `step`, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


def evaluated_steps(last: int, budgets: Iterable[int] = ()) -> tuple[int, ...]:
    """0, the powers of two and the budgets below `last`, and `last`."""
    powers = (2**i for i in range(last.bit_length()))
    return tuple(sorted({0, last, *(step for step in (*powers, *budgets) if 0 < step < last)}))


class AttackData:
    """Micro-batches of every step of an attack. Raises ValueError where tokens and context do not fit."""

    def __init__(self, corpus: Corpus, config: Config, attack: Attack):
        context = config.model.context
        count, rest = divmod(attack.tokens, context)
        if rest or count < len(attack.parts):
            raise ValueError(
                f"--tokens {attack.tokens}: a step of {attack.data} takes a multiple of model.context, {context} "
                f"tokens, and at least {len(attack.parts) * context}"
            )
        self.readers = [
            ShuffledSequences(corpus, config, categories, attack.seed, _ORDER) for categories in attack.parts
        ]
        self.shares = [count // len(attack.parts) + (i < count % len(attack.parts)) for i in range(len(attack.parts))]
        micro_batch = config.for_ranks(1).micro_batch
        assert micro_batch is not None  # `for_ranks` derives it
        self.micro_batch = micro_batch

    def step(self, step: int) -> list[Batch]:
        """Return those of update `step`, counted from 0."""
        sequences = [
            sequence
            for reader, share in zip(self.readers, self.shares, strict=True)
            for sequence in reader.take(step * share, share)
        ]
        targets = sum(int(np.count_nonzero(sequence.targets != IGNORE)) for sequence in sequences)
        labels = frozenset(label for sequence in sequences for label in sequence.labels)
        groups = (sequences[i : i + self.micro_batch] for i in range(0, len(sequences), self.micro_batch))
        return [collate(group, self.readers[0].isolated, targets, labels) for group in groups]


def tamper(subject: Subject, attack: Attack) -> Iterator[tuple[int, Subject]]:
    """(step, subject as attacked so far) at the evaluated steps; the subject's own model stays as it is.

    The model that is handed out is trained on afterwards, so measure it before the next one. Where a gradient is not
    finite the attack has diverged and ends. Raises ValueError as `AttackData`.
    """
    data = AttackData(subject.corpus, subject.config, attack)
    model = copy.deepcopy(subject.model).requires_grad_()
    attacked = replace(subject, model=model)
    parameters = dict(model.named_parameters())
    optimizer = _optimizer(attacked, attack)
    if 0 in attack.evaluated:
        yield 0, attacked
    for step in range(attack.steps):
        batches = data.step(step)
        model.zero_grad(set_to_none=True)
        for batch in batches:
            ids, targets, plan = batch.on(attacked.device, attacked.tables)
            model(ids, targets, plan, 1 / max(1, batch.step_targets))[0].backward()
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        norm = float(torch.stack(torch._foreach_norm(gradients)).double().norm())
        if not math.isfinite(norm):
            return
        optimizer.begin_step(live_keys(attacked.tables, batches[0].step_labels), attack.learning_rate(step))
        optimizer.factors = [min(1.0, attack.clip / norm) if attack.clip and norm else 1.0]
        optimizer.step()
        if step + 1 in attack.evaluated:
            yield step + 1, attacked


def _optimizer(subject: Subject, attack: Attack) -> SegmentedAdamW:
    """Freezes whatever no label may update: the removed groups get no decay either."""
    parameters, rows = dict(subject.model.named_parameters()), subject.model.parameter_rows()
    settings = OptimizerConfig(lr=attack.lr, weight_decay=attack.weight_decay)
    optimizer = SegmentedAdamW(parameters.values(), settings, subject.model.backend)
    fragments = [Fragment(p, 0, name, 0, p.numel()) for name, p in parameters.items()]
    numels = {name: p.numel() for name, p in parameters.items()}
    keys = {key for layout in rows.values() for key in layout.keys}
    optimizer.set_segments(segment_tables(fragments, numels, rows), keys)
    return optimizer


class Documents(NamedTuple):
    """Held-out forget documents, in the order of the evaluation, which depends on corpus, context and packing alone.

    losses   in nats, summed over the targets of each; targets: their numbers
    """

    losses: tuple[float, ...]
    targets: tuple[int, ...]


class HeldOut(NamedTuple):
    """Losses in nats per target token with standard errors over documents; `retain` None without such a category.

    forget, retain  over the tokens of all their categories; categories  by category; documents  those of `forget`
    """

    forget: Estimate
    retain: Estimate | None
    categories: dict[str, Estimate]
    documents: Documents


def held_out(
    subject: Subject,
    forget: Sequence[str],
    retain: Sequence[str] = (),
    *,
    split: str = "test",
    sequences: int | None = None,
) -> HeldOut:
    """Measure up to `sequences` sequences of each category. Raises ValueError for a category that the split lacks."""
    documents = {}
    for category in dict.fromkeys((*forget, *retain)):
        scores = subject.scores(split, category, sequences)
        documents[category] = by_document(scores.losses, scores.document)
    losses, targets = (torch.cat(parts) for parts in zip(*(documents[name] for name in forget), strict=True))
    return HeldOut(
        _estimate([documents[category] for category in forget]),
        _estimate([documents[category] for category in retain]) if retain else None,
        {category: of_documents(*pair) for category, pair in documents.items()},
        Documents(tuple(losses.tolist()), tuple(targets.long().tolist())),
    )


def _estimate(documents: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Estimate:
    """Of (sums of losses, numbers of targets) by document, of one category or more."""
    return of_documents(*(torch.cat(parts) for parts in zip(*documents, strict=True)))


class Reached(NamedTuple):
    """What an attack has reached after `step` steps, held-out and in nats.

    loss, error  on forget data, NaN after a divergence; its standard error
    retain       loss on retain data, None where none is measured
    documents    of the loss; None where they were not stored
    """

    attack: Attack
    step: int
    loss: float
    error: float | None = None
    retain: float | None = None
    documents: Documents | None = None


class Difference(NamedTuple):
    """Difference of two losses, in nats.

    error   its standard error, None for a single document
    paired  whether it is that of the differences by document; else the losses count as measured on other documents,
            independent of each other: too large an error where it is the same ones
    """

    value: float
    error: float | None
    paired: bool


def difference(mine: Reached, other: Reached) -> Difference:
    """`mine` minus `other`, measured on the same documents; error as in sgtm/evaluation/losses.py."""
    value, one, two = mine.loss - other.loss, mine.documents, other.documents
    if one and two and one.targets == two.targets:
        sums = [torch.tensor(documents.losses, dtype=torch.float64) for documents in (one, two)]
        counts = torch.tensor(one.targets, dtype=torch.float64)
        return Difference(value, standard_error(sums[0] - sums[1], counts), paired=True)
    independent = None if mine.error is None or other.error is None else math.hypot(mine.error, other.error)
    return Difference(value, independent, paired=False)


def worst_case(losses: Iterable[Reached]) -> dict[int, Reached]:
    """By evaluated step n, ascending: the lowest loss of any attack at a step <= n; of equal ones the earliest.

    Losses that are not finite are those of attacks that have failed: they are left out. Raises ValueError where there
    is no other.
    """
    finite = sorted((r for r in losses if math.isfinite(r.loss)), key=lambda reached: reached.step)
    if not finite:
        raise ValueError("no attack has a finite loss: the model has diverged before it was attacked")
    curve: dict[int, Reached] = {}
    lowest = finite[0]
    for reached in finite:
        lowest = reached if reached.loss < lowest.loss else lowest
        curve[reached.step] = lowest
    return curve


def relearned(curve: dict[int, Reached], loss: float) -> int | None:
    """The first evaluated step at which the worst case is at or below a loss; None: at none.

    Nothing is interpolated: the loss was reached after the evaluated step before, and by this one.
    """
    return next((step for step, reached in curve.items() if reached.loss <= loss), None)
