"""The label channel: from what a document is to what it is trained as.

One row-stochastic matrix P(applied | true), drawn once per document from a hash of (seed, document id), covers label
noise (recall, false positives, undiscovered forget data), the share of retain data trained in retain mode, and GRAM's
auxiliary spread. The draw never depends on order, process or library version.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sgtm.masking.labels import LabelSpace


@dataclass(frozen=True, eq=False)
class LabelChannel:
    """`matrix[true, applied]`: float64 [labels, labels], rows non-negative and summing to 1.

    Raises ValueError for any other shape or row.
    """

    matrix: np.ndarray

    def __post_init__(self):
        m = self.matrix
        if m.ndim != 2 or m.shape[0] != m.shape[1] or (m < 0).any() or not np.allclose(m.sum(1), 1, atol=1e-9):
            raise ValueError(f"a label channel is a square matrix whose rows are probabilities, got {m.tolist()}")

    @classmethod
    def from_rows(cls, space: LabelSpace, rows: dict[str, dict[str, float]]) -> LabelChannel:
        """Identity, but for the rows given as {true label: {applied label: probability}}.

        What a row leaves out stays with the true label if it is not named, else the row must sum to 1. Raises
        ValueError naming the row that does not.
        """
        matrix = np.eye(len(space.labels))
        for true, row in rows.items():
            t = space.label(true)
            values = np.zeros(len(space.labels))
            for applied, p in row.items():
                values[space.label(applied)] = p
            if true not in row:
                values[t] = 1 - values.sum()
            if (values < 0).any() or abs(values.sum() - 1) > 1e-9:
                raise ValueError(f"label channel row {true!r}: {row} must be probabilities that sum to 1")
            matrix[t] = values
        return cls(matrix)

    def apply(self, true_labels: np.ndarray, document_ids: np.ndarray, seed: int) -> np.ndarray:
        """Applied label of each document: int64 [documents], from int64 true labels and document ids."""
        draws = uniform_hash(document_ids, seed)
        edges = np.cumsum(self.matrix, axis=1)[np.asarray(true_labels)]
        edges[edges > 1 - 1e-9] = 1.0  # a cumulative sum of 0.9999... must not leak a draw into the next label
        return (draws[:, None] >= edges).sum(1).astype(np.int64)


def uniform_hash(ids: np.ndarray, seed: int) -> np.ndarray:
    """float64 in [0, 1) for each integer id: SplitMix64's finaliser over (seed, id) (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        z = np.asarray(ids).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64((seed * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
