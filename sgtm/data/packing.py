"""Documents laid end to end and cut into sequences, by arithmetic alone.

A `Stream` is an order of documents and the cumulative sum of their lengths; its sequence `i` is tokens `i*context :
(i+1)*context` and their targets are the tokens one further. Nothing is copied until a sequence is read, so an epoch
costs 20 bytes per document. Which sequence holds what depends on (corpus, channel, seed, epoch, context, mixing,
upsample). The order of documents is drawn by epoch, so that no document always lies in the tail, and so is a fraction
of `upsample`: 0.3 lets in three tenths of the documents, others in each epoch, each of them three times in ten epochs.

The promises: every token of a document that `upsample` lets in is in one sequence per copy, label and epoch, but for
the tail of a stream that fills no sequence; where labels mix or documents are isolated, no target crosses from one
document into the next (`tests/unit/test_data_packing.py`). A token filter takes targets, or tokens, out of the
sequences; it moves none (`tests/unit/test_token_filter.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from sgtm.data.batch import IGNORE
from sgtm.data.store import Corpus
from sgtm.masking.channel import LabelChannel, uniform_hash
from sgtm.masking.labels import LabelSpace

_SHUFFLE, _UPSAMPLE = 1, 2


class Piece(NamedTuple):
    """Tokens `start:end` of a document, all of one label; `last`: the document ends here."""

    document: int
    start: int
    end: int
    label: int
    last: bool


class Sequence(NamedTuple):
    """int64 [context] each, and the pieces that lie in it, in order."""

    input_ids: np.ndarray
    targets: np.ndarray
    labels: tuple[int, ...]
    lengths: tuple[int, ...]
    documents: tuple[tuple[int, int], ...]


def derived_seed(seed: int, purpose: int, epoch: int = 0) -> int:
    """A seed of its own for each purpose and epoch of a run's seed."""
    return (seed * 2**32) + (purpose * 2**24) + epoch


def shuffled(count: int, seed: int) -> np.ndarray:
    """int64 permutation of `count` numbers: by hash, so that no library version changes the order of the data."""
    return np.argsort(uniform_hash(np.arange(count), seed), kind="stable")


@dataclass(frozen=True, eq=False)
class Stream:
    """Documents end to end.

    order     int64 [n] positions in the corpus
    starts    int64 [n + 1] where each begins in the stream
    labels    int16 [n] applied label of each
    spans     labelled stretches inside documents, or None
    isolated  whether documents neither attend to nor predict one another
    filtered  labels whose tokens are no targets: isolated documents and the span policy `position` only
    hidden    whether such tokens are read as EOS, too
    """

    corpus: Corpus
    order: np.ndarray
    starts: np.ndarray
    labels: np.ndarray
    context: int
    isolated: bool
    spans: SpanLabels | None = None
    filtered: range = range(0)
    hidden: bool = False

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def sequences(self) -> int:
        """How many sequences the stream fills."""
        return self.tokens // self.context

    def pieces(self, sequence: int, own: bool = False) -> list[Piece]:
        """What lies in a sequence. One past the last full sequence is shorter. own: as of `SpanLabels.pieces`."""
        begin, end = sequence * self.context, min((sequence + 1) * self.context, self.tokens)
        pieces: list[Piece] = []
        position = int(np.searchsorted(self.starts, begin, side="right")) - 1
        while begin < end:
            start, stop = int(self.starts[position]), int(self.starts[position + 1])
            document, label, until = int(self.order[position]), int(self.labels[position]), min(stop, end)
            inner = self.spans.pieces(document, label, stop - start, own) if self.spans else [(0, stop - start, label)]
            for first, last, piece_label in inner:
                first, last = max(first, begin - start), min(last, until - start)
                if first < last:
                    pieces.append(Piece(document, first, last, piece_label, start + last == stop))
            begin, position = until, position + 1
        return pieces

    def read(self, sequence: int) -> Sequence:
        """Reads a sequence, and filters it; past the end of the stream it is padded with EOS and has no targets."""
        input_ids = np.full(self.context, self.corpus.eos_id, np.int64)
        targets = np.full(self.context, IGNORE, np.int64)
        labels: list[int] = []
        lengths: list[int] = []
        documents: list[tuple[int, int, int]] = []  # number, start and end in the sequence
        position = 0
        for piece in self.pieces(sequence):
            end = position + piece.end - piece.start
            ahead = self.corpus.tokens(piece.document, piece.start, piece.end + (not piece.last))
            input_ids[position:end] = ahead[: end - position]
            # A document's first token is the target of the position before it, which an earlier piece has left open.
            targets[position : position + len(ahead) - 1] = ahead[1:]
            if position and not self.isolated and piece.start == 0:
                targets[position - 1] = ahead[0]
            if piece.label in self.filtered:
                targets[position:end] = IGNORE
            labels.append(piece.label)
            lengths.append(end - position)
            if piece.start and documents and documents[-1][0] == piece.document:
                documents[-1] = (piece.document, documents[-1][1], end)
            else:
                documents.append((piece.document, position, end))
            position = end
        if position == self.context and not self.isolated:
            self._cross_boundary(targets, sequence)
        if self.hidden:
            self._hide(input_ids, sequence)
        if position < self.context:
            labels.append(labels[-1] if labels else int(self.labels[-1]))
            lengths.append(self.context - position)
            documents.append((-1, position, self.context))
        return Sequence(input_ids, targets, tuple(labels), tuple(lengths), tuple(d[1:] for d in documents))

    def _cross_boundary(self, targets: np.ndarray, sequence: int) -> None:
        """The last target of a sequence that ends where a document ends is the first token of the next document."""
        end = (sequence + 1) * self.context
        position = int(np.searchsorted(self.starts, end))
        if end < self.tokens and self.starts[position] == end:
            targets[-1] = self.corpus.tokens(int(self.order[position]), 0, 1)[0]

    def _hide(self, input_ids: np.ndarray, sequence: int) -> None:
        """A token is hidden by its own label: that of the position before it, where there is one in its document."""
        position = 0
        for piece in self.pieces(sequence, own=True):
            end = position + piece.end - piece.start
            if piece.label in self.filtered:
                input_ids[position:end] = self.corpus.eos_id
            position = end

    def owners(self, sequences: list[int]) -> np.ndarray:
        """int64 [n, context]: the position in `order` of the document that the target of each position belongs to; past
        the end of the stream the last one."""
        targets = np.array(sequences, np.int64)[:, None] * self.context + np.arange(1, self.context + 1)
        return np.searchsorted(self.starts, np.minimum(targets, self.tokens - 1), side="right") - 1

    def target_count(self, sequences: np.ndarray) -> int:
        """Number of targets in these sequences (int64 [n]), without reading a token."""
        if self.filtered:
            pieces = [piece for sequence in sequences for piece in self.pieces(int(sequence))]
            trained = [piece for piece in pieces if piece.label not in self.filtered]
            return sum(piece.end - piece.start - piece.last for piece in trained)
        begin = np.asarray(sequences, np.int64) * self.context
        end = np.minimum(begin + self.context, self.tokens)
        missing = (
            np.searchsorted(self.starts[1:], end, side="right") - np.searchsorted(self.starts[1:], begin, side="right")
            if self.isolated
            else end == self.tokens
        )
        return int((end - begin - missing).sum())


@dataclass(frozen=True, eq=False)
class SpanLabels:
    """Applied labels of the stretches inside documents: `SPAN` records sorted by document, int64 label of each.

    forget  the labels that the conservative policy extends to what comes before them
    """

    spans: np.ndarray
    labels: np.ndarray
    policy: str
    forget: range

    @cached_property
    def _documents(self) -> np.ndarray:
        """Document of each, end to end: a search in the field of the records would copy it every time."""
        return np.ascontiguousarray(self.spans["document"])

    def pieces(self, document: int, label: int, length: int, own: bool = False) -> list[tuple[int, int, int]]:
        """(start, end, label) covering a document of `length` tokens whose own label is `label`.

        `position`: a position has the label of the token it predicts, its target. `conservative`: everything up to the
        document's last forget token is that forget label, so that no earlier position, to which a forget token attends,
        is trained as anything else.

        own  with `position`, by the label of the token that a position reads, in place of its target's
        """
        first, last = np.searchsorted(self._documents, [document, document + 1])
        ahead = int(self.policy == "position" and not own)
        pieces, position = [], 0
        for span, span_label in zip(self.spans[first:last], self.labels[first:last], strict=True):
            start, end = max(0, int(span["start"]) - ahead), int(span["end"]) - ahead
            pieces += [(position, start, label), (start, end, int(span_label))]
            position = end
        pieces = [piece for piece in (*pieces, (position, length, label)) if piece[0] < piece[1]]
        forget = [i for i, piece in enumerate(pieces) if piece[2] in self.forget]
        if self.policy == "conservative" and forget:
            last_forget = pieces[forget[-1]]
            pieces = [(0, *last_forget[1:]), *pieces[forget[-1] + 1 :]]
        return pieces


def pack(
    corpus: Corpus,
    documents: np.ndarray,
    space: LabelSpace,
    channel: LabelChannel,
    *,
    seed: int,
    context: int,
    mixing: str,
    epoch: int = 0,
    upsample: dict[str, float] | None = None,
    isolate_documents: bool = False,
    span_policy: str = "conservative",
    token_filter: str = "off",
) -> dict[int | None, Stream]:
    """Streams of `context`-token sequences: one per applied label, or for mixing `token` a single one under None.

    documents          int64 positions in the corpus
    isolate_documents  no target crosses from one document into the next; mixing `token` needs it
    token_filter       what of forget tokens is filtered: `off`, `loss` or `hide` (`data.token_filter`)

    Raises ValueError where a corpus with labelled spans is packed into label-pure sequences, where `upsample` names an
    unknown category, or where the conservative policy meets a document of two forget domains.
    """
    filtered = space.forget_labels if token_filter != "off" else range(0)
    assert not filtered or (isolate_documents and mixing == "token" and span_policy == "position")
    spans = _applied_spans(corpus, documents, space, channel, seed, mixing, span_policy)
    documents = _upsampled(corpus, documents, upsample or {}, seed, epoch)
    records = corpus.documents[documents]
    true_labels = corpus.label_of_category(space)[records["category"]]
    passes, labels = channel.apply(true_labels, records["id"], seed)
    documents, records, labels = documents[passes], records[passes], labels.astype(np.int16)
    if spans and span_policy == "conservative":
        _check_one_domain(corpus, documents, labels, spans)
    order = shuffled(len(documents), derived_seed(seed, _SHUFFLE, epoch))
    chosen = {None: order} if mixing == "token" else {int(l): order[labels[order] == l] for l in np.unique(labels)}
    return {
        label: Stream(
            corpus,
            documents[of],
            _starts(records["length"][of]),
            labels[of],
            context,
            isolate_documents,
            spans,
            filtered,
            hidden=token_filter == "hide",
        )
        for label, of in chosen.items()
    }


def in_order(
    corpus: Corpus, documents: np.ndarray, labels: np.ndarray, context: int, isolated: bool, spans: SpanLabels | None
) -> Stream:
    """A stream of these documents as they are given, with the label of each (int16): for evaluation."""
    return Stream(corpus, documents, _starts(corpus.documents["length"][documents]), labels, context, isolated, spans)


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def check_upsample(corpus: Corpus, upsample: dict[str, float]) -> None:
    """Raises ValueError where `data.upsample` names a category that the corpus lacks."""
    if unknown := set(upsample) - set(corpus.categories):
        raise ValueError(
            f"data.upsample names {', '.join(sorted(unknown))}; the categories of {corpus.path} are "
            f"{', '.join(corpus.categories)}"
        )


def _upsampled(corpus: Corpus, documents: np.ndarray, upsample: dict[str, float], seed: int, epoch: int) -> np.ndarray:
    """Documents repeated by `upsample`: whole copies, and one more where a draw passes a whole number.

    The draws of a category's documents are evenly spaced, in the order of a hash, and grow by the fraction with every
    epoch: an epoch has its share of the documents, rounded, and in any N epochs a document comes N times the factor,
    rounded. Two epochs share the border between them, so that rounding of floats neither repeats nor skips a document.
    """
    check_upsample(corpus, upsample)
    factors = np.array([upsample.get(category, 1.0) for category in corpus.categories])
    categories = corpus.documents["category"][documents]
    factor = factors[categories]
    by_hash = np.argsort(uniform_hash(corpus.documents["id"][documents], derived_seed(seed, _UPSAMPLE)), kind="stable")
    draws = np.empty(len(documents))
    for category in np.unique(categories):
        of = by_hash[categories[by_hash] == category]
        draws[of] = (np.arange(len(of)) + 0.5) / len(of)
    whole = np.floor(factor)
    before, after = (np.floor(draws + end * (factor - whole)) for end in (epoch - 1, epoch))
    return np.repeat(documents, (whole + after - before).astype(np.int64))


def _applied_spans(
    corpus: Corpus, documents: np.ndarray, space: LabelSpace, channel: LabelChannel, seed: int, mixing: str, policy: str
) -> SpanLabels | None:
    spans = corpus.spans[np.isin(corpus.spans["document"], documents)]
    if not len(spans):
        return None
    if mixing != "token":
        raise ValueError(
            f"{corpus.path} has documents with labelled spans, which make labels change inside sequences; "
            f"they need data.mixing: token, not {mixing}"
        )
    true_labels = corpus.label_of_category(space)[spans["category"]]
    ids = corpus.documents["id"][spans["document"]]
    passes, labels = channel.apply(true_labels, ids, seed)
    if len(passes) > len(spans):
        raise ValueError(
            "a row of data.channel sums to more than 1 for a label of spans: a span inside a document is trained once"
        )
    return SpanLabels(spans, labels, policy, space.forget_labels)


def _check_one_domain(corpus: Corpus, documents: np.ndarray, labels: np.ndarray, spans: SpanLabels) -> None:
    """A document's forget tokens attend to one another, so no single domain could be made to learn all of them."""
    pairs = np.concatenate(
        [np.stack([documents, labels], axis=1), np.stack([spans.spans["document"], spans.labels], axis=1)]
    )
    forget = np.unique(pairs[np.isin(pairs[:, 1], spans.forget)], axis=0)
    twice = forget[1:, 0][forget[1:, 0] == forget[:-1, 0]]
    if len(twice):
        raise ValueError(
            f"document {twice[0]} of {corpus.path} has forget tokens of two domains, which attend to one another; "
            f"set masking.span_policy: position, or label it as one domain"
        )
