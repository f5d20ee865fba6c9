"""Sequences of some categories, without end, for what trains on a run's text after the run: attacks and unlearning.

Sequences are those of an evaluation: documents of a category in a fixed shuffled order, packed as in training. Every
epoch reads all of them once, in an order of its own, which follows from seed, purpose, epoch and their number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from sgtm.config.schema import Config
from sgtm.data.evaluation import sequences_of
from sgtm.data.loader import isolates_documents
from sgtm.data.packing import Sequence as Packed
from sgtm.data.packing import derived_seed, shuffled
from sgtm.data.store import Corpus

SPLIT = "train"


class ShuffledSequences:
    """Those that hold a target, each with the true label of its category.

    seed, purpose  of the order; a purpose is a number of the caller's own
    isolated       whether documents do not see one another

    Raises ValueError, naming the categories, where one of them has no text in split `train`.
    """

    def __init__(self, corpus: Corpus, config: Config, categories: Sequence[str], seed: int, purpose: int):
        # Spans isolate the documents of some categories; a micro-batch may hold several.
        self.isolated = isolates_documents(config.data) or len(corpus.spans) > 0
        self._parts = [sequences_of(corpus, SPLIT, name, config.model.context, self.isolated) for name in categories]
        self._labels = [config.space.label(corpus.categories[name]) for name in categories]
        if empty := [name for name, part in zip(categories, self._parts, strict=True) if not part.targets]:
            raise ValueError(
                f"{corpus.path} has no text of category {', '.join(empty)} in its split {SPLIT}: nothing to read"
            )
        self._ends = np.cumsum([len(part.numbers) for part in self._parts])
        self._order = lru_cache(2)(lambda epoch: shuffled(len(self), derived_seed(seed, purpose, epoch)))

    def __len__(self) -> int:
        """Of an epoch."""
        return int(self._ends[-1])

    def take(self, first: int, count: int) -> list[Packed]:
        """Sequences `first` to `first + count` of all epochs together."""
        return [self._sequence(number) for number in range(first, first + count)]

    def _sequence(self, number: int) -> Packed:
        epoch, position = divmod(number, len(self))
        index = int(self._order(epoch)[position])
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part].sequence(index - int(self._ends[part - 1] if part else 0), self._labels[part])
