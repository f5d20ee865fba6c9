"""Which sequences a category's loss is measured on, and which of their targets are the category's.

A target in a labelled span is of the span's category, any other of its document's: every target of a split is of one
category (`tests/unit/test_data_evaluation.py`).
"""

from __future__ import annotations

from collections.abc import Sequence as Numbers
from itertools import islice
from typing import NamedTuple

import numpy as np

from sgtm.data.batch import IGNORE
from sgtm.data.packing import Sequence, SpanLabels, Stream, in_order, shuffled
from sgtm.data.store import Corpus


class Measured(NamedTuple):
    """Sequences of one category of one split.

    numbers   of the sequences in the stream that have a target of the category
    targets   of the category in all of them
    category  its position in the corpus, where documents of the stream have spans, else None
    """

    stream: Stream  # its labels are categories
    numbers: Numbers[int]
    targets: int
    category: int | None

    def number(self, position: int) -> int:
        """The sequence of the stream at a position of `numbers`; past their end one that holds padding alone."""
        past_the_end = -(-self.stream.tokens // self.stream.context)
        return self.numbers[position] if position < len(self.numbers) else past_the_end

    def sequence(self, position: int, label: int) -> Sequence:
        """The sequence at a position of `numbers`, as one of this label; other categories' targets are `IGNORE`."""
        read = self.stream.read(self.number(position))
        targets = read.targets
        if self.category is not None:
            targets = np.where(np.repeat(np.array(read.labels) == self.category, read.lengths), targets, IGNORE)
        return read._replace(targets=targets, labels=(label,) * len(read.labels))


def sequences_of(
    corpus: Corpus, split: str, category: str, context: int, isolated: bool, limit: int | None = None
) -> Measured:
    """At most `limit` sequences of a category, None: all. Its documents come in a fixed shuffled order.

    isolated  whether documents neither attend to nor predict one another; with spans in them they never do

    Raises ValueError for a split or category that the corpus does not have.
    """
    whole, number = corpus.select(split, category), list(corpus.categories).index(category)
    spans, split_number = corpus.spans, corpus.manifest.splits.index(split)
    in_split = corpus.documents["split"][spans["document"]] == split_number
    holding = np.unique(spans["document"][in_split & (spans["category"] == number)])
    documents = np.union1d(whole, holding)
    documents = documents[shuffled(len(documents), seed=0)]
    categories = corpus.documents["category"][documents]
    if not np.isin(documents, spans["document"]).any():
        stream = in_order(corpus, documents, categories, context, isolated, None)
        available = -(-stream.tokens // context)
        numbers = range(min(available, limit or available))
        return Measured(stream, numbers, stream.target_count(np.array(numbers, np.int64)), None)
    inside = SpanLabels(spans, spans["category"], "position", range(0))  # the label of a position is its target's
    stream = in_order(corpus, documents, categories, context, True, inside)
    counts = ((i, _targets(stream, i, number)) for i in range(-(-stream.tokens // context)))
    target_counts = list(islice(((i, targets) for i, targets in counts if targets), limit))
    return Measured(stream, [i for i, _ in target_counts], sum(targets for _, targets in target_counts), number)


def _targets(stream: Stream, sequence: int, category: int) -> int:
    """Targets of a category in a sequence of isolated documents; reads no token."""
    pieces = [piece for piece in stream.pieces(sequence) if piece.label == category]
    return sum(piece.end - piece.start - piece.last for piece in pieces)
