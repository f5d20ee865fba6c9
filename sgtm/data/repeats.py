"""Documents that occur more than once."""

from __future__ import annotations

import numpy as np

from sgtm.data.store import Corpus


def repeated_texts(corpus: Corpus) -> list[str]:
    """What is likely a mistake about equal texts, for the terminal: repeats, in train and test, of several labels."""
    documents, splits = corpus.documents, corpus.manifest.splits
    ids, text = np.unique(documents["id"], return_inverse=True)
    if len(ids) == len(documents):
        return []
    found = [f"{len(documents) - len(ids):,} of {len(documents):,} documents repeat the text of another one"]
    if "train" in splits and "test" in splits:
        split = documents["split"]
        trained = text[split == splits.index("train")]
        shared = int(np.isin(text[split == splits.index("test")], trained).sum())
        if shared:
            found.append(
                f"{shared:,} documents of split test have the text of one in split train, whose loss is learned"
            )
    names = sorted(set(corpus.categories.values()))
    label = np.array([names.index(name) for name in corpus.categories.values()])[documents["category"]]
    kinds = np.bincount(np.unique(text * len(names) + label) // len(names))
    if several := int((kinds > 1).sum()):
        found.append(
            f"{several:,} texts occur under more than one true label: what one label holds back another teaches"
        )
    return found


def repeated_names(names: list[np.ndarray]) -> tuple[int, int, tuple[int, int] | None]:
    """Of 64-bit hashes of names, by block: names that occur more than once, their documents, and where the first is.

    The place is (block, position in it), None where every name is another.
    """
    joined = np.concatenate([np.empty(0, np.uint64), *names])
    _, first, counts = np.unique(joined, return_index=True, return_counts=True)
    repeated = counts > 1
    if not repeated.any():
        return 0, 0, None
    place = int(first[repeated].min())
    starts = np.cumsum([0, *map(len, names)])
    block = int(np.searchsorted(starts, place, side="right")) - 1
    return int(repeated.sum()), int(counts[repeated].sum()), (block, place - int(starts[block]))
