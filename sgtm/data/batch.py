"""What the loader hands to the training step: one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgtm_kernels.cross_entropy.pytorch import IGNORE
from sgtm_kernels.plan import MaskPlan, Tables, merge_label_runs

__all__ = ["IGNORE", "Batch", "Owners"]


@dataclass(frozen=True)
class Owners:
    """Whose the targets of a micro-batch of an evaluation are.

    index  int64 [B, S]: the document that each target belongs to, by its position in the order of the evaluation; any
           where there is no target
    count  number of documents of the whole evaluation, over all ranks
    """

    index: torch.Tensor
    count: int


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
                  denominator of the loss. 0 where `data.token_filter` leaves none
    step_labels   labels present anywhere in the global step: what may be updated follows from it, alike on all ranks
    owners        documents of the targets; in an evaluation only
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    labels: tuple[int, ...]
    lengths: tuple[int, ...]
    documents: tuple[tuple[int, int], ...] | None
    step_targets: int
    step_labels: frozenset[int]
    owners: Owners | None = None

    def plan(self, tables: Tables) -> MaskPlan:
        """The masks of this micro-batch under a strategy."""
        runs = merge_label_runs(list(self.labels), list(self.lengths))
        batch, seq_len = self.input_ids.shape
        return MaskPlan(tables, runs, batch, seq_len, documents=self.documents)

    def on(self, device: torch.device, tables: Tables) -> tuple[torch.Tensor, torch.Tensor, MaskPlan]:
        """`input_ids` and `targets` on a device, and the plan, with the tensors that its ops need there.

        One non-blocking copy from pinned memory; none if the device is the CPU. Tensors that depend on the strategy
        alone are copied once per process (`sgtm_kernels.plan.table_on`). One exception: where `SGTM_LINEAR` or a
        tuned table takes `rectangles`, each part whose labels are too many slices copies tables of its own, once.
        """
        plan = self.plan(tables)
        if device.type == "cpu":
            return self.input_ids, self.targets, plan
        by_token, (batch, seq_len) = plan.by_token, self.input_ids.shape
        tokens, rows = batch * seq_len, len(by_token)
        words = 2 * tokens + (rows * tokens + 1) // 2  # of 8 bytes: the plan's are int32
        packed = torch.empty(words, dtype=torch.int64, pin_memory=device.type == "cuda")
        for into, tensor in zip(_unpacked(packed, tokens, rows), (self.input_ids, self.targets, by_token), strict=True):
            into.view_as(tensor).copy_(tensor)
        ids, targets, by_token = _unpacked(packed.to(device, non_blocking=True), tokens, rows)
        plan.arrived(by_token)
        return ids.view(batch, seq_len), targets.view(batch, seq_len), plan


def _unpacked(packed: torch.Tensor, tokens: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of `Batch.on`'s buffer: input ids and targets int64 [tokens], and the plan's int32 [rows, tokens]."""
    ids, targets, rest = packed.split((tokens, tokens, len(packed) - 2 * tokens))
    return ids, targets, rest.view(torch.int32)[: rows * tokens].view(rows, tokens)
