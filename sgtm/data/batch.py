"""What the loader hands to the training step: one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgtm_kernels.cross_entropy.runs import IGNORE
from sgtm_kernels.plan import MaskPlan, Tables, merge_runs

__all__ = ["IGNORE", "Batch"]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of `B` sequences of `S` tokens.

    input_ids     int64 [B, S]
    targets       int64 [B, S]: the next token of each, or `IGNORE` where there is none to predict
    labels        applied label of every piece, in order over the flattened B*S tokens; neighbours may repeat
    lengths       number of tokens of every piece; sums to B*S
    documents     token ranges (start, end) over the flattened tokens that must not attend to one another, or None where
                  sequences attend freely within themselves
    step_targets  number of targets that are not `IGNORE` in the whole global step, all ranks and micro-batches: the
                  denominator of the loss
    step_labels   labels present anywhere in the global step: what may be updated follows from it, alike on all ranks
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    labels: tuple[int, ...]
    lengths: tuple[int, ...]
    documents: tuple[tuple[int, int], ...] | None
    step_targets: int
    step_labels: frozenset[int]

    def plan(self, tables: Tables) -> MaskPlan:
        """The masks of this micro-batch under a strategy."""
        runs = merge_runs(list(self.labels), list(self.lengths))
        return MaskPlan(tables, runs, *self.input_ids.shape, documents=self.documents)
