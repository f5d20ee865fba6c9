"""One global step: its learning rate, what is computed, and what is counted on the way.

The loss of a step is one mean over the target tokens of the whole global step, whatever the packing, the accumulation
or the number of ranks: every micro-batch divides the sum of its token losses by the same global count, and gradients
add up. So does what `train.expert_balance` adds to the gradient alone (sgtm/model/balance.py). The learning rate is a
pure function of the step, so that resuming needs no state of it. Gradient norms, by group and by label, come from the
shards, without gathering a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch

from sgtm.config.schema import OptimizerConfig
from sgtm.data.batch import IGNORE, Batch
from sgtm.masking.labels import JOINT_GROUP, RETAIN_GROUP
from sgtm.model.rows import live_keys
from sgtm_kernels.plan import Tables

if TYPE_CHECKING:  # deepspeed takes seconds to import
    from sgtm.distributed.engine import Engine
    from sgtm.model.output_norms import OutputNorms


def target_counts(batch: Batch, labels: int) -> torch.Tensor:
    """int64 [labels]: how many targets of each applied label the micro-batch has."""
    valid = (batch.targets.flatten() != IGNORE).numpy().astype(np.int64)
    starts = np.cumsum((0, *batch.lengths[:-1]))
    counts = np.bincount(batch.labels, weights=np.add.reduceat(valid, starts), minlength=labels)
    return torch.from_numpy(counts.astype(np.int64))


class TotalsState(TypedDict):
    """The state of `StepTotals` in a checkpoint."""

    sums: torch.Tensor
    counts: torch.Tensor
    clipping: torch.Tensor
    skipped: int
    in_a_row: int


class StepTotals:
    """What is gathered over steps without a device sync: token losses and targets by applied label, and clipping.

    clipping  steps, clipped ones, sum of the factors; since it was taken
    skipped   steps of the run that were skipped, wholly or for some domains; nothing of theirs is in the totals
    in_a_row  steps that did not update the retain group, since the last that did
    The last three are the same on all ranks.
    """

    def __init__(self, labels: int, device: torch.device):
        self.sums = torch.zeros(labels, dtype=torch.float64, device=device)
        self.counts = torch.zeros(labels, dtype=torch.int64)
        self.clipping = torch.zeros(3, dtype=torch.float64)
        self.skipped = self.in_a_row = 0
        self._step = torch.zeros_like(self.sums), torch.zeros_like(self.counts)

    def state(self) -> TotalsState:
        """What has been gathered on this rank since it was taken, for a checkpoint."""
        return {
            "sums": self.sums.cpu(),
            "counts": self.counts,
            "clipping": self.clipping.cpu(),
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
        }

    def restore(self, states: list[TotalsState], rank: int, ranks: int) -> None:
        """Resume from what all ranks saved: each from its own, or where there are other ranks now, rank 0 from all."""
        for state in states[rank : rank + 1] if len(states) == ranks else states if rank == 0 else []:
            self.sums += state["sums"].to(self.sums.device)
            self.counts += state["counts"]
        self.clipping.copy_(states[0]["clipping"])
        self.skipped, self.in_a_row = states[0]["skipped"], states[0]["in_a_row"]

    def add(self, sums: torch.Tensor, counts: torch.Tensor) -> None:
        """A micro-batch of the step in progress."""
        self._step = self._step[0] + sums, self._step[1] + counts

    def end_step(self, finite: bool, retain: bool | None = None) -> None:
        """Take over what was added since the last call; not `finite`: the step was skipped, so it is only counted.

        retain  whether the retain group was updated nevertheless (`grad_clip_scope: owner`); None: as `finite`
        """
        retain = finite if retain is None else retain
        sums, counts = self._step
        if finite:
            self.sums += sums
            self.counts += counts
        self.skipped, self.in_a_row = self.skipped + (not finite), 0 if retain else self.in_a_row + 1
        self._step = torch.zeros_like(sums), torch.zeros_like(counts)

    def add_step(self, factor: torch.Tensor) -> None:
        """Count a step whose gradient was multiplied by `factor`, a scalar up to 1, to be clipped."""
        self.clipping += torch.stack([torch.ones_like(factor), factor < 1, factor]).to(self.clipping.device)

    def take(self, engine: Engine) -> tuple[np.ndarray, np.ndarray]:
        """Totals over all ranks, float64 and int64 [labels]; starts over."""
        counts = self.counts.to(self.sums.dtype).to(self.sums.device)
        sums, totals = engine.all_reduce_sum(torch.stack([self.sums, counts])).cpu().numpy()
        self.sums.zero_()
        self.counts.zero_()
        return sums, totals.astype(np.int64)

    def take_clipping(self) -> tuple[float, float]:
        """Share of the steps whose gradient was clipped, and the mean factor; NaN after no step; starts over."""
        steps, clipped, factors = self.clipping.tolist()
        self.clipping.zero_()
        return (clipped / steps, factors / steps) if steps else (math.nan, math.nan)


def train_step(
    engine: Engine,
    batches: list[Batch],
    tables: Tables,
    lr: float,
    totals: StepTotals | None,
    measure: bool = False,
    norms: OutputNorms | None = None,
) -> None:
    """Forward, backward and update for this rank's micro-batches of one global step.

    What the step may update follows from the labels in the whole global step, so all ranks agree. `totals` None:
    nothing is counted and nothing is updated (the dry run, the probe). A step without any target has loss 0 and updates
    nothing either, moments and decay included. measure: as in `Engine.step`. norms: takes the output norms of all
    micro-batches, if given.
    """
    learns = totals is not None and batches[0].step_targets > 0
    balance = engine.config.train.expert_balance
    for batch in batches:
        ids, targets, plan = batch.on(engine.device, tables)
        loss, sums = engine(ids, targets, plan, 1.0 / max(1, batch.step_targets), norms, balance)
        engine.backward(loss)
        if totals is not None:
            totals.add(sums, target_counts(batch, len(tables.labels)))
    live = live_keys(tables, batches[0].step_labels) if learns else frozenset()
    engine.step(live, lr, measure)
    if totals is not None:
        retain = RETAIN_GROUP not in engine.skipped
        totals.end_step(engine.finite, retain)
        if retain:
            totals.add_step(engine.clip_factor())


def learning_rate(step: int, optimizer: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of the global step `step` (from 0).

    Linear from `warmup_start * lr` at step 0 to `lr` at the end of the warm-up, then a half cosine down to
    `final_lr * lr`, which the step after the last (`total_steps`) would have.
    """
    peak, warmup = optimizer.lr, optimizer.warmup(total_steps)
    if step < warmup:
        return peak * (optimizer.warmup_start + (1 - optimizer.warmup_start) * step / warmup)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return peak * (optimizer.final_lr + (1 - optimizer.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def group_norms(key_norms: Mapping[str, float], groups: Iterable[str]) -> dict[str, float]:
    """L2 norm by group from norms by key (sgtm/model/rows.py); `joint`: of all weights that no group owns."""
    norms = dict.fromkeys((*groups, JOINT_GROUP), 0.0)
    for key, norm in key_norms.items():
        _, owned, group = key.partition(".")
        name = group if owned else JOINT_GROUP
        norms[name] = math.hypot(norms[name], norm)
    return norms


def probe(engine: Engine, batches: list[Batch], tables: Tables) -> dict[str, dict[str, float]]:
    """{label: {group: L2 norm}} of the gradient that each label's targets bring to this step, for labels it has.

    Only the label's targets are counted and the masks stay as they are: where the method keeps a label from a group,
    the norm is exactly 0. Losses are divided by the targets of the whole step, so that the gradients of all labels add
    up to the step's. Nothing is updated; it takes the time of one step for each label. A collective call.
    """
    norms = {}
    for label in sorted(batches[0].step_labels):
        train_step(engine, [only(batch, label) for batch in batches], tables, 0.0, None, measure=True)
        norms[tables.labels[label]] = group_norms(engine.key_norms(), tables.groups)
    return norms


def only(batch: Batch, label: int) -> Batch:
    """The batch with the targets of this label alone; the others are `IGNORE`."""
    labels = torch.repeat_interleave(torch.tensor(batch.labels), torch.tensor(batch.lengths))
    return replace(batch, targets=batch.targets.masked_fill(labels.view_as(batch.targets) != label, IGNORE))
