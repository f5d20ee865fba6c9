"""What a corpus holds, and what about it is likely a mistake."""

from __future__ import annotations

import numpy as np
from rich.table import Table

from sgtm.data.repeats import repeated_texts
from sgtm.data.rules import DROP, Rules
from sgtm.data.store import Corpus

FEW_TOKENS = 1000
"""A category's test split with fewer is tiny: where losses of tokens spread by 3 nats, their mean is good to 0.1."""

ONLY_FORGET = "nothing in split train is retain or unlabeled: the model without its domains learns next to nothing"


def summary(corpus: Corpus) -> Table:
    """What a corpus holds, as a table."""
    m = corpus.manifest
    skipped = f"; {m.empty} empty and {m.dropped} dropped documents left out" if m.empty or m.dropped else ""
    table = Table(title=f"{corpus.path}: vocabulary of {m.vocab_size}, {len(m.shards)} shards{skipped}")
    for column in ("split", "category", "true label"):
        table.add_column(column)
    for column in ("documents", "tokens"):
        table.add_column(column, justify="right")
    for split, by_category in m.counts.items():
        for category, count in by_category.items():
            table.add_row(split, category, m.categories[category], f"{count.documents:,}", f"{count.tokens:,}")
    return table


def warnings(corpus: Corpus, rules: Rules) -> list[str]:
    """What need not be wrong and usually is: rules that matched nothing, splits that cannot be trained or measured.

    Of dropped categories only their total is known, so they are named where nothing at all was dropped.
    """
    m = corpus.manifest
    found = [
        f"no document is in split {split}; {reader} needs it (rules: split)"
        for split, reader in (("train", "training"), ("test", "evaluation"))
        if split not in m.splits
    ]
    found += [
        f"split.hash of the rules: no document fell into {split}"
        for split, share in (rules.split.hash or {}).items()
        if share and split not in (*m.splits, "test")
    ]
    trained = labels_of(corpus, "train")
    if trained and trained.isdisjoint(("retain", "unlabeled")):
        found.append(f"{ONLY_FORGET} (rules: labels)")
    found += [*m.notes, *repeated_texts(corpus)]
    unmatched = [category for category, label in rules.labels.items() if label == DROP and not m.dropped]
    in_spans = _span_categories(corpus)
    for category in m.categories:
        tokens = {split: by[category].tokens if category in by else 0 for split, by in m.counts.items()}
        if any(tokens.values()):
            found += _split_warnings(category, tokens)
        elif category not in in_spans:
            unmatched.append(category)
    if unmatched:
        found.append(f"labels of the rules: no document is of category {', '.join(unmatched)}")
    return found


def labels_of(corpus: Corpus, split: str) -> set[str]:
    """True labels of a split's documents, and of labelled spans in whatever split."""
    return set(trained_categories(corpus, split).values())


def trained_categories(corpus: Corpus, split: str = "train") -> dict[str, str]:
    """True label of each category that a split's documents have, or labelled spans in whatever split."""
    m = corpus.manifest
    return {category: m.categories[category] for category in {*m.counts.get(split, {}), *_span_categories(corpus)}}


def _span_categories(corpus: Corpus) -> set[str]:
    names = list(corpus.manifest.categories)
    return {names[number] for number in np.unique(corpus.spans["category"])}


def _split_warnings(category: str, tokens: dict[str, int]) -> list[str]:
    found = []
    if tokens.get("train") == 0:
        found.append(f"category {category} has no document in split train: nothing of it is learned")
    if tokens.get("test") == 0:
        found.append(f"category {category} has no document in split test: it has no loss in an evaluation")
    elif tokens.get("test", FEW_TOKENS) < FEW_TOKENS:
        few = f"{tokens['test']:,} tokens"
        found.append(f"category {category} has only {few} in split test: its loss in an evaluation is not reliable")
    return found
