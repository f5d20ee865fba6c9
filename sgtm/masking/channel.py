"""The label channel: from what a document is to what it is trained as.

One matrix of P(applied | true), drawn once per document from a hash of (seed, document id), covers label noise (recall,
false positives, undiscovered forget data), the share of retain data trained in retain mode, GRAM's auxiliary spread and
core share, and documents that are trained twice, under two labels. The draw never depends on order, process or library
version.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sgtm.masking.labels import LabelSpace


@dataclass(frozen=True, eq=False)
class LabelChannel:
    """`matrix[true, applied]`: float64 [labels, labels], rows of shares between 0 and 1 that sum to 1 or more.

    A row of sum s trains each of its documents s times on average: with the draw u of a document in [0, 1), the labels
    are those in which u, u + 1, u + 2, ... below s fall when the shares are laid end to end. With `retain: 1,
    forget:es: 0.2` every document is trained as retain, and a fifth of them as `forget:es` as well.

    Raises ValueError for any other shape or row.
    """

    matrix: np.ndarray

    def __post_init__(self):
        m = self.matrix
        square = m.ndim == 2 and m.shape[0] == m.shape[1]
        if not square or (m < 0).any() or (m > 1).any() or (m.sum(1) < 1 - 1e-9).any():
            raise ValueError(
                f"a label channel is a square matrix of shares, rows summing to 1 or more, got {m.tolist()}"
            )

    @classmethod
    def from_rows(cls, space: LabelSpace, rows: dict[str, dict[str, float]], both_ways: bool = False) -> LabelChannel:
        """Identity, but for the rows given as {true label: {applied label: share}}.

        What a row leaves out stays with the true label if it is not named, else the row must sum to 1.
        both_ways  a row may also sum to more than 1
        Raises ValueError naming the row that does not.
        """
        matrix = np.eye(len(space.labels))
        for true, row in rows.items():
            t = space.label(true)
            values = np.zeros(len(space.labels))
            for applied, p in row.items():
                values[space.label(applied)] = p
            if true not in row:
                values[t] = max(0.0, 1 - values.sum())
            total = values.sum()
            if (values < 0).any() or (values > 1).any() or total < 1 - 1e-9 or (total > 1 + 1e-9 and not both_ways):
                raise ValueError(
                    f"label channel row {true!r}: {row} must be probabilities that sum to 1"
                    f"{' or more' if both_ways else ' (or more, with data.both_ways)'}"
                )
            matrix[t] = values
        return cls(matrix)

    def apply(self, true_labels: np.ndarray, document_ids: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Which documents are trained, and as what.

        true_labels, document_ids  int64 [documents]
        Returns int64 [n] positions in these arrays, ascending first passes before second ones, and int64 [n] labels.
        """
        draws, true_labels = uniform_hash(document_ids, seed), np.asarray(true_labels)
        edges = np.cumsum(self.matrix, axis=1)
        # A cumulative sum of 0.9999... must not leak a draw into the next label.
        whole = np.round(edges)
        edges = np.where(abs(edges - whole) < 1e-9, whole, edges)
        positions, labels = [], []
        for nth in range(int(np.ceil(edges[:, -1].max(initial=1)))):
            chosen = np.flatnonzero(draws + nth < edges[true_labels, -1])
            positions.append(chosen)
            labels.append(((draws[chosen] + nth)[:, None] >= edges[true_labels[chosen]]).sum(1))
        return np.concatenate(positions), np.concatenate(labels).astype(np.int64)


def uniform_hash(ids: np.ndarray, seed: int) -> np.ndarray:
    """float64 in [0, 1) for each integer id: SplitMix64's finaliser over (seed, id) (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        z = np.asarray(ids).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64((seed * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
