"""What queries see, in the forms that public attention takes: documents, edges of documents, first keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sgtm_kernels.plan import MaskPlan


class Visible:
    """Sequences `first:last` of a micro-batch: a query sees the last `window` keys of its document, itself included.

    What is derived from it is made once for a plan, as every layer of a model needs the same, and on the device, from
    the plan's `spans`: those are copied there with the micro-batch.

    window     keys; None where it does not cut a sequence
    documents  token ranges, counted from the first of these sequences; None where each sequence is one document
    """

    def __init__(self, plan: MaskPlan, window: int | None = None, first: int = 0, last: int | None = None):
        self.plan, self.first, self.last = plan, first, plan.batch if last is None else last
        self.window = window if window is not None and window < plan.seq_len else None

    @property
    def documents(self) -> tuple[tuple[int, int], ...] | None:
        return self.plan.cached(("documents", self.first, self.last), self._documents)

    def _documents(self) -> tuple[tuple[int, int], ...] | None:
        if self.plan.documents is None:
            return None
        start, end = self.first * self.plan.seq_len, self.last * self.plan.seq_len
        documents = tuple((s - start, e - start) for s, e in self.plan.documents if start <= s < end)
        return documents if len(documents) > self.last - self.first else None

    @property
    def whole(self) -> bool:
        """Whether every query sees all of its sequence's past."""
        return self.window is None and self.documents is None

    def edges(self, device: torch.device) -> tuple[torch.Tensor, int]:
        """int32 [documents + 1]: where the documents begin, and the end of the last; and the longest one's length.

        Needs `documents` that are not None.
        """

        def make() -> tuple[torch.Tensor, int]:
            documents = self.documents
            assert documents is not None
            start, position = self._starts(device)
            tokens = start.numel()
            first = torch.where(start == position, torch.arange(tokens, device=device).view_as(start), tokens)
            first = first.flatten().sort().values[: len(documents)].int()
            return F.pad(first, (0, 1), value=tokens), max(end - start for start, end in documents)

        return self.plan.cached(("edges", self.first, self.last, device), make)

    def first_keys(self, device: torch.device) -> torch.Tensor:
        """int32 [sequences, S]: the first key that each query sees; it never falls within a sequence."""
        start, position = self._starts(device)
        return torch.maximum(start, position - (self.window or self.plan.seq_len) + 1)

    def _starts(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 [sequences, S] and [S]: where the document of each token begins in its sequence; and each position."""
        plan = self.plan
        start = plan.spans(device)[0].view(plan.batch, plan.seq_len)[self.first : self.last]
        return start, torch.arange(plan.seq_len, dtype=torch.int32, device=device)
