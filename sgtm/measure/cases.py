"""Labels of a timed step: a share of forget tokens in a mixing mode, on random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

import torch

from sgtm.data.batch import Batch
from sgtm.masking.labels import FIRST_FORGET, UNLABELED
from sgtm.masking.shape import ModelShape
from sgtm.masking.strategy import build_tables
from sgtm.measure.models import LABELS, Setting
from sgtm_kernels.plan import Tables

MICRO_BLOCKS = 4  # default of data.micro_blocks
DOCUMENTS = (5, 20, 25, 25, 25)  # percent of a sequence
NONE: Final = "none"
NOTHING, PURE = "nothing masked", "pure forget"


@dataclass(frozen=True)
class Pieces:
    """Labels, lengths and documents of a micro-batch, as in `sgtm.data.batch.Batch`."""

    labels: tuple[int, ...]
    lengths: tuple[int, ...]
    documents: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Case:
    """One step of ours.

    percent  of forget tokens
    mixing   the modes of which this is a step
    of       name of the unmasked step on the same batches
    """

    tables: Tables
    batches: tuple[Pieces, ...]
    percent: int
    mixing: tuple[str, ...] = ()
    of: str = NONE


@dataclass(frozen=True)
class Mean:
    """A weighted mean of other cases, as a mixing mode takes them in the long run: `weights` by name, sum 1."""

    percent: int
    mixing: tuple[str, ...]
    weights: dict[str, float]
    of: str


def cases(setting: Setting) -> dict[str, Case | Mean]:
    """Every share of forget tokens in every mixing mode, each step once.

    With 0 and 100 % the modes do not differ. A share that is finer than a step of the mode can have (one label for a
    step, a quarter of it for `micro`, a sequence of few) comes about over steps: a mean of two others.
    """
    every = ("step", "micro", "sequence", "token")
    none, sgtm = build_tables(LABELS, "none"), build_tables(LABELS, "sgtm", setting.joint)
    plain = by_sequence(setting, 0)
    by_name: dict[str, Case | Mean] = {
        NONE: Case(none, plain, 0, every),
        NOTHING: Case(sgtm, plain, 0, every),
        PURE: Case(sgtm, by_sequence(setting, 100), 100, every),
        "25 %, sequence": Case(sgtm, by_sequence(setting, 25), 25, ("sequence",)),
    }
    if setting.sequences * 5 % 100:
        by_name["5 %, sequence"] = Mean(5, ("sequence",), {NOTHING: 0.8, "25 %, sequence": 0.2}, NONE)
    else:
        by_name["5 %, sequence"] = Case(sgtm, by_sequence(setting, 5), 5, ("sequence",))
    for percent in (5, 25):
        weights = {NOTHING: 1 - percent / 100, PURE: percent / 100}
        by_name[f"{percent} %, step"] = Mean(percent, ("step",), weights, NONE)
    for mode, batches, percents in (("token", by_document, (5, 25)), ("micro", by_micro_batch, (0, 25))):
        base = f"{NONE}, {mode}"
        by_name[base] = Case(none, batches(setting, 0), 0, (mode,), base)
        for percent in percents:
            name = f"{percent} %, {mode}" if percent else f"{NOTHING}, {mode}"
            by_name[name] = Case(sgtm, batches(setting, percent), percent, (mode,), base)
    weights = {f"{NOTHING}, micro": 0.8, "25 %, micro": 0.2}
    return by_name | {"5 %, micro": Mean(5, ("micro",), weights, f"{NONE}, micro")}


def by_sequence(setting: Setting, percent: int) -> tuple[Pieces, ...]:
    """Whole sequences of a label, sorted by label."""
    n = setting.sequences * percent // 100
    labels = [FIRST_FORGET] * n + [UNLABELED] * (setting.sequences - n)
    return dealt(labels, setting.accumulation, setting.model.context)


def dealt(labels: list[int], micro_batches: int, context: int) -> tuple[Pieces, ...]:
    """Sequences with these labels dealt out to the micro-batches, as by the loader."""
    hands = [tuple(labels[hand::micro_batches]) for hand in range(micro_batches)]
    return tuple(Pieces(hand, (context,) * len(hand)) for hand in hands)


def by_micro_batch(setting: Setting, percent: int) -> tuple[Pieces, ...]:
    """`MICRO_BLOCKS` micro-batches, each of one label."""
    n, lengths = MICRO_BLOCKS * percent // 100, (setting.model.context,) * setting.micro_batch
    labels = [FIRST_FORGET] * n + [UNLABELED] * (MICRO_BLOCKS - n)
    return tuple(Pieces((label,) * setting.micro_batch, lengths) for label in labels)


def by_document(setting: Setting, percent: int) -> tuple[Pieces, ...]:
    """Sequences of five documents that do not attend to one another, in another order in each; the same cuts whatever
    the labels are."""
    shares = list(accumulate(DOCUMENTS, initial=0))
    context, forget = setting.model.context, shares.index(percent)
    sizes = [end - start for start, end in pairwise(share * context // 100 for share in shares)]
    batches = []
    for _ in range(setting.accumulation):
        order = [(row + i) % len(sizes) for row in range(setting.micro_batch) for i in range(len(sizes))]
        lengths = tuple(sizes[i] for i in order)
        labels = tuple(FIRST_FORGET if i < forget else UNLABELED for i in order)
        batches.append(Pieces(labels, lengths, tuple(pairwise(accumulate(lengths, initial=0)))))
    return tuple(batches)


def random_batches(
    batches: tuple[Pieces, ...], model: ModelShape, device: torch.device, step_targets: int | None = None
) -> list[Batch]:
    """Random tokens, every one of them with a target; the same ones for batches of the same sizes.

    model         its vocabulary and context count: a ModelShape, or section `model` of a config
    step_targets  of the step on all ranks; default: those of these batches
    """
    generator = torch.Generator().manual_seed(0)
    tokens = sum(sum(pieces.lengths) for pieces in batches)
    labels = frozenset(label for pieces in batches for label in pieces.labels)
    results = []
    for pieces in batches:
        size = (sum(pieces.lengths) // model.context, model.context)
        ids, targets = (torch.randint(model.vocab_size, size, generator=generator).to(device) for _ in range(2))
        results.append(
            Batch(ids, targets, pieces.labels, pieces.lengths, pieces.documents, step_targets or tokens, labels)
        )
    return results
