"""What the methods read of a micro-batch, and the sequences of the training split that the micro-batches hold.

Sequences are those of an evaluation: documents of a category in a fixed shuffled order, packed as in training. A step
reads the next ones of a shuffled order of all sequences of its categories, which is another one in every epoch; it
follows from the seed, the number of sequences and the step alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from sgtm.config.schema import Config
from sgtm.data.batch import IGNORE, Batch
from sgtm.data.evaluation import sequences_of
from sgtm.data.loader import collate, isolates_documents
from sgtm.data.packing import derived_seed, shuffled
from sgtm.data.store import Corpus
from sgtm.model.transformer import Transformer
from sgtm_kernels.plan import MaskPlan, Tables

SPLIT = "train"
_ORDER = 0x75  # purpose of the seed


class Text(NamedTuple):
    """input_ids, targets: int64 [B, S] on the model's device, targets -100 where there is none; plan: their masks."""

    input_ids: torch.Tensor
    targets: torch.Tensor
    plan: MaskPlan

    @property
    def chosen(self) -> torch.Tensor:
        """bool [B, S]: where there is a target."""
        return self.targets != IGNORE


class Loss(NamedTuple):
    """total: fp32 scalar to minimise. parts: scalars that a log shows, without gradient, by name."""

    total: torch.Tensor
    parts: dict[str, torch.Tensor]


def mean_loss(model: Transformer, text: Text) -> torch.Tensor:
    """Nats per target, fp32 scalar; 0 for text without a target."""
    return model(*text, 1.0 / max(1, int(text.chosen.sum())))[0]


def log_likelihood(model: Transformer, text: Text) -> torch.Tensor:
    """fp32 [B]: log-probability of all targets of each sequence, in nats; its gradient reaches the model."""
    x, weight, bias = model.last_hidden(text.input_ids, text.plan)
    logits = F.linear(x, weight, bias).float().flatten(0, 1)
    losses = F.cross_entropy(logits, text.targets.flatten(), ignore_index=IGNORE, reduction="none")
    return -losses.view_as(text.targets).sum(1)


class Sequences:
    """The sequences of some categories, all of one true label, that hold a target.

    Raises ValueError, naming the categories, where one of them has no text in the split.
    """

    def __init__(self, corpus: Corpus, config: Config, categories: Sequence[str], seed: int):
        config = config.for_ranks(1)
        self.size, self.seed, context = config.micro_batch, seed, config.model.context
        (self.label,) = {config.space.label(corpus.categories[category]) for category in categories}
        # Sequences of different categories share a micro-batch, and those with spans are isolated.
        self.isolated = isolates_documents(config.data) or len(corpus.spans) > 0
        self.parts = [sequences_of(corpus, SPLIT, category, context, self.isolated) for category in categories]
        if empty := [category for category, part in zip(categories, self.parts, strict=True) if not part.targets]:
            raise ValueError(
                f"{corpus.path} has no text of category {', '.join(empty)} in its split {SPLIT}: nothing to read"
            )
        self.ends = np.cumsum([len(part.numbers) for part in self.parts])
        self._order = lru_cache(2)(self._new_order)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def batch(self, step: int) -> Batch:
        """The micro-batch of a step, counted from 0."""
        numbers = [self._located(number) for number in range(step * self.size, (step + 1) * self.size)]
        sequences = [self.parts[part].sequence(number, self.label) for part, number in numbers]
        targets = sum(int((sequence.targets != IGNORE).sum()) for sequence in sequences)
        return collate(sequences, self.isolated, targets, frozenset({self.label}))

    def text(self, step: int, device: torch.device, tables: Tables) -> Text:
        return Text(*self.batch(step).on(device, tables))

    def _located(self, number: int) -> tuple[int, int]:
        epoch, position = divmod(number, len(self))
        index = int(self._order(epoch)[position])
        part = int(np.searchsorted(self.ends, index, side="right"))
        return part, index - int(self.ends[part - 1] if part else 0)

    def _new_order(self, epoch: int) -> np.ndarray:
        return shuffled(len(self), derived_seed(self.seed, _ORDER, epoch))
