"""What a run trains on: its tokens by true and by applied label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from sgtm.config.schema import Config
from sgtm.data.loader import Loader
from sgtm.data.packing import SpanLabels, Stream
from sgtm.data.store import Corpus


def trained_tokens(corpus: Corpus, config: Config) -> dict[str, dict[str, float]]:
    """Tokens of the whole run by true label and by the label that they are trained as.

    Shares are those of the first epoch of each label channel, so that a run that ends inside an epoch differs from them
    by what its own sequences happen to hold. Labels without tokens are left out, and what `data.token_filter` filters.

    Raises ValueError where corpus and config do not fit, as the loader does.
    """
    orders, train = Loader(corpus, config).orders, config.train
    starts = [start for start, _ in orders]
    labels, true_labels = config.space.labels, corpus.label_of_category(config.space)
    filtered = config.space.forget_labels if config.data.token_filter != "off" else ()
    tokens: dict[str, dict[str, float]] = {}
    for (start, order), end in zip(orders, [*starts[1:], train.steps], strict=True):
        epoch = sum((_stream_tokens(stream, true_labels) for stream in order.streams.values()), Counter())
        run = (end - start) * train.tokens_per_step
        for (true, applied), count in sorted(epoch.items()):
            if applied in filtered:
                continue
            row = tokens.setdefault(labels[true], {})
            row[labels[applied]] = row.get(labels[applied], 0) + run * count / epoch.total()
    return tokens


def _stream_tokens(stream: Stream, true_labels: np.ndarray) -> Counter[tuple[int, int]]:
    """Tokens of a stream by (true label, applied label)."""
    lengths, own = np.diff(stream.starts), true_labels[stream.corpus.documents["category"][stream.order]]
    spans = stream.spans
    spanned = np.isin(stream.order, spans.spans["document"]) if spans else np.zeros(len(lengths), bool)
    tokens: Counter[tuple[int, int]] = Counter()
    for true, applied in np.unique(np.stack([own, stream.labels])[:, ~spanned], axis=1).T.tolist():
        tokens[true, applied] = int(lengths[~spanned & (own == true) & (stream.labels == applied)].sum())
    if spans:
        for i in np.flatnonzero(spanned):
            document, label, length = int(stream.order[i]), int(stream.labels[i]), int(lengths[i])
            tokens.update(_position_labels(spans, true_labels, document, int(own[i]), label, length))
    return tokens


def _position_labels(
    spans: SpanLabels, true_labels: np.ndarray, document: int, own: int, label: int, length: int
) -> Iterator[tuple[int, int]]:
    """(true label, applied label) of every position of a document that is of label `own`, and trained as `label`."""
    true, applied = np.full(length, own), np.empty(length, np.int64)
    ahead = int(spans.policy == "position")  # where a position has the label of the token it predicts
    for span in spans.spans[spans.spans["document"] == document]:
        true[max(0, span["start"] - ahead) : span["end"] - ahead] = true_labels[span["category"]]
    for first, last, piece_label in spans.pieces(document, label, length):
        applied[first:last] = piece_label
    return zip(true.tolist(), applied.tolist(), strict=True)
