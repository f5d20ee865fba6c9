"""What a corpus holds, and what about it is likely a mistake, such as documents that occur more than once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from rich.table import Table

from sgtm.data.rules import DROP, Rules
from sgtm.data.store import Corpus
from sgtm.words import counted

FEW_TOKENS = 1000
"""A category's test split with fewer is tiny: where losses of tokens spread by 3 nats, their mean is good to 0.1."""

ONLY_FORGET = "nothing in split train is retain or unlabeled: the model without its domains learns next to nothing"


class CategoryCount(NamedTuple):
    """What a split has of a category: a token in a labelled span is of the span's category, any other its document's.

    documents  that have tokens of the category; one with spans is in the counts of several
    tokens     of the category
    spans      labelled stretches of the category
    in_spans   tokens in them
    """

    documents: int
    tokens: int
    spans: int
    in_spans: int


def category_counts(corpus: Corpus) -> dict[str, dict[str, CategoryCount]]:
    """By split and category; categories without tokens in a split are left out."""
    m, names, spans = corpus.manifest, list(corpus.categories), corpus.spans
    shape = len(m.splits), len(names)
    of, lengths = corpus.documents[spans["document"]], spans["end"] - spans["start"]

    def by_split_and_category(
        category: np.ndarray, chosen: np.ndarray | slice, weights: np.ndarray | None = None
    ) -> np.ndarray:
        cell = of["split"][chosen].astype(np.int64) * len(names) + category[chosen]
        return np.bincount(cell, None if weights is None else weights[chosen], shape[0] * shape[1]).reshape(shape)

    everywhere = slice(None)
    number, inside = (
        by_split_and_category(spans["category"], everywhere),
        by_split_and_category(spans["category"], everywhere, lengths),
    )
    taken = by_split_and_category(of["category"], everywhere, lengths)  # from the document's own category
    _, first = np.unique(np.stack([spans["document"], spans["category"]]), axis=1, return_index=True)
    guests = by_split_and_category(spans["category"], first[of["category"][first] != spans["category"][first]])
    by_split: dict[str, dict[str, CategoryCount]] = {}
    for s, split in enumerate(m.splits):
        by_split[split] = {}
        for c, name in enumerate(names):
            whole = m.counts[split].get(name)
            documents, tokens = (whole.documents, whole.tokens) if whole else (0, 0)
            tokens += int(inside[s, c]) - int(taken[s, c])
            if tokens:
                documents += int(guests[s, c])
                by_split[split][name] = CategoryCount(documents, tokens, int(number[s, c]), int(inside[s, c]))
    return by_split


def summary(corpus: Corpus) -> Table:
    """What a corpus holds, as a table; with columns for labelled spans where there are any."""
    m = corpus.manifest
    dropped = counted(m.dropped, "dropped document")
    skipped = f"; {m.empty:,} empty and {dropped} left out" if m.empty or m.dropped else ""
    table = Table(title=f"{corpus.path}: vocabulary of {m.vocab_size}, {counted(len(m.shards), 'shard')}{skipped}")
    for column in ("split", "category", "true label"):
        table.add_column(column)
    columns = ("documents", "tokens", "spans", "tokens in spans")[: 4 if len(corpus.spans) else 2]
    for column in columns:
        table.add_column(column, justify="right")
    for split, by_category in category_counts(corpus).items():
        for category, count in by_category.items():
            cells = [f"{number:,}" for number in count[: len(columns)]]
            table.add_row(split, category, m.categories[category], *cells)
    return table


def warnings(corpus: Corpus, rules: Rules) -> list[str]:
    """What need not be wrong and usually is: rules that matched nothing, splits that cannot be trained or measured.

    Of dropped categories only their total is known, so they are named where nothing at all was dropped.
    """
    m = corpus.manifest
    sentences = [
        f"no document is in split {split}; {reader} needs it (rules: split)"
        for split, reader in (("train", "training"), ("test", "evaluation"))
        if split not in m.splits
    ]
    sentences += [
        f"split.hash of the rules: no document fell into {split}"
        for split, share in (rules.split.hash or {}).items()
        if share and split not in (*m.splits, "test")
    ]
    trained = labels_of(corpus, "train")
    if trained and trained.isdisjoint(("retain", "unlabeled")):
        sentences.append(f"{ONLY_FORGET} (rules: labels)")
    sentences += [*m.notes, *repeated_texts(corpus)]
    unmatched = [category for category, label in rules.labels.items() if label == DROP and not m.dropped]
    counts = category_counts(corpus)
    for category in m.categories:
        tokens = {split: by[category].tokens if category in by else 0 for split, by in counts.items()}
        if any(tokens.values()):
            sentences += _split_warnings(category, tokens, rules)
        else:
            unmatched.append(category)
    if unmatched:
        sentences.append(f"labels of the rules: no document is of category {', '.join(unmatched)}")
    return sentences


def labels_of(corpus: Corpus, split: str) -> set[str]:
    """True labels of a split's documents and of the labelled spans in them."""
    return set(trained_categories(corpus, split).values())


def trained_categories(corpus: Corpus, split: str = "train") -> dict[str, str]:
    """True label of each category that a split's documents have, or the labelled spans in them."""
    m = corpus.manifest
    if split not in m.splits:
        return {}
    inside = corpus.documents["split"][corpus.spans["document"]] == m.splits.index(split)
    spanned = [list(m.categories)[number] for number in np.unique(corpus.spans["category"][inside])]
    return {category: m.categories[category] for category in {*m.counts.get(split, {}), *spanned}}


def _split_warnings(category: str, tokens: dict[str, int], rules: Rules) -> list[str]:
    sentences = []
    if tokens.get("train") == 0:
        sentences.append(f"category {category} has no document in split train: nothing of it is learned")
    if tokens.get("test") == 0:
        sentences.append(f"category {category} has no document in split test: it has no loss in an evaluation")
    elif tokens.get("test", FEW_TOKENS) < FEW_TOKENS:
        few = counted(tokens["test"], "token")
        more = "raise test in split.hash" if rules.split.hash else "put more of its documents into the split"
        sentences.append(
            f"category {category} has only {few} in split test: its loss in an evaluation is not reliable; {more} "
            f"(rules: split)"
        )
    return sentences


def repeated_texts(corpus: Corpus) -> list[str]:
    """What is likely a mistake about equal texts, for the terminal: repeats, in train and test, of several labels."""
    documents, splits = corpus.documents, corpus.manifest.splits
    ids, text = np.unique(documents["id"], return_inverse=True)
    if len(ids) == len(documents):
        return []
    repeats = len(documents) - len(ids)
    verb = "repeats" if repeats == 1 else "repeat"
    sentences = [f"{repeats:,} of {len(documents):,} documents {verb} the text of another one"]
    if "train" in splits and "test" in splits:
        split = documents["split"]
        trained = text[split == splits.index("train")]
        shared = int(np.isin(text[split == splits.index("test")], trained).sum())
        if shared:
            have = counted(shared, "document of split test has", "documents of split test have")
            sentences.append(f"{have} the text of one in split train, whose loss is learned")
    names = sorted(set(corpus.categories.values()))
    label = np.array([names.index(name) for name in corpus.categories.values()])[documents["category"]]
    kinds = np.bincount(np.unique(text * len(names) + label) // len(names))
    if several := int((kinds > 1).sum()):
        occur = counted(several, "text occurs", "texts occur")
        sentences.append(f"{occur} under more than one true label: what one label holds back another teaches")
    return sentences


def repeated_names(names: list[np.ndarray]) -> tuple[int, int, tuple[int, int] | None]:
    """Of 64-bit hashes of names, by block: names that occur more than once, their documents, and where the first is.

    The first is (block, position in it), None where every name is another.
    """
    joined = np.concatenate([np.empty(0, np.uint64), *names])
    _, first, counts = np.unique(joined, return_index=True, return_counts=True)
    repeated = counts > 1
    if not repeated.any():
        return 0, 0, None
    position = int(first[repeated].min())
    starts = np.cumsum([0, *map(len, names)])
    block = int(np.searchsorted(starts, position, side="right")) - 1
    return int(repeated.sum()), int(counts[repeated].sum()), (block, position - int(starts[block]))
