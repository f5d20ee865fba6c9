"""What the methods read of a micro-batch, and the micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sgtm.config.schema import Config
from sgtm.data.batch import IGNORE, Batch
from sgtm.data.loader import collate
from sgtm.data.shuffled_sequences import ShuffledSequences
from sgtm.data.store import Corpus
from sgtm.model.transformer import Transformer
from sgtm_kernels.plan import MaskPlan, Tables

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
    """The sequences of some categories, all of one true label, in micro-batches.

    Raises ValueError as `ShuffledSequences`.
    """

    def __init__(self, corpus: Corpus, config: Config, categories: Sequence[str], seed: int):
        config = config.for_ranks(1)
        self.size = config.micro_batch
        (self.label,) = {config.space.label(corpus.categories[category]) for category in categories}
        self.shuffled = ShuffledSequences(corpus, config, categories, seed, _ORDER)

    def __len__(self) -> int:
        return len(self.shuffled)

    def batch(self, step: int) -> Batch:
        """The micro-batch of a step, counted from 0."""
        sequences = self.shuffled.take(step * self.size, self.size)
        targets = sum(int((sequence.targets != IGNORE).sum()) for sequence in sequences)
        return collate(sequences, self.shuffled.isolated, targets, frozenset({self.label}))

    def text(self, step: int, device: torch.device, tables: Tables) -> Text:
        return Text(*self.batch(step).on(device, tables))
