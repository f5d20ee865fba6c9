"""One global step: what is computed, and what is counted on the way.

The loss of a step is one mean over the target tokens of the whole global step, whatever the packing, the accumulation
or the number of ranks: every micro-batch divides the sum of its token losses by the same global count, and gradients
add up.
"""

from __future__ import annotations

import numpy as np
import torch

from sgtm.data.batch import IGNORE, Batch
from sgtm.distributed.engine import Engine
from sgtm.model.rows import live_keys
from sgtm_kernels.plan import Tables


def target_counts(batch: Batch, labels: int) -> torch.Tensor:
    """int64 [labels]: how many targets of each applied label the micro-batch has."""
    valid = (batch.targets.flatten() != IGNORE).numpy().astype(np.int64)
    starts = np.cumsum((0, *batch.lengths[:-1]))
    counts = np.bincount(batch.labels, weights=np.add.reduceat(valid, starts), minlength=labels)
    return torch.from_numpy(counts.astype(np.int64))


class LossTotals:
    """Sums of token losses and counts of targets by applied label, gathered over steps without a device sync."""

    def __init__(self, labels: int, device: torch.device):
        self.sums = torch.zeros(labels, dtype=torch.float64, device=device)
        self.counts = torch.zeros(labels, dtype=torch.int64)

    def state(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What has been gathered on this rank since `take`, for a checkpoint."""
        return self.sums.cpu(), self.counts

    def restore(self, states: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Go on from these, this rank's or several ranks'."""
        for sums, counts in states:
            self.add(sums.to(self.sums.device), counts)

    def add(self, sums: torch.Tensor, counts: torch.Tensor) -> None:
        self.sums += sums
        self.counts += counts

    def take(self, engine: Engine) -> tuple[np.ndarray, np.ndarray]:
        """Totals over all ranks, float64 and int64 [labels]; starts over."""
        counts = self.counts.to(self.sums.dtype).to(self.sums.device)
        sums, totals = engine.all_reduce_sum(torch.stack([self.sums, counts])).cpu().numpy()
        self.sums.zero_()
        self.counts.zero_()
        return sums, totals.astype(np.int64)


def train_step(engine: Engine, batches: list[Batch], tables: Tables, lr: float, totals: LossTotals | None) -> None:
    """Forward, backward and update for this rank's micro-batches of one global step.

    What the step may update follows from the labels in the whole global step, so all ranks agree. `totals` None:
    nothing is counted and nothing is updated (the dry run).
    """
    for batch in batches:
        ids, targets = (t.to(engine.device, non_blocking=True) for t in (batch.input_ids, batch.targets))
        loss, sums = engine(ids, targets, batch.plan(tables), 1.0 / batch.step_targets)
        engine.backward(loss)
        if totals is not None:
            totals.add(sums, target_counts(batch, len(tables.labels)))
    live = frozenset() if totals is None else live_keys(tables, batches[0].step_labels)
    engine.step(live, lr)
