"""The label column of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sgtm.config.sections import MaskingConfig
from sgtm.integrations.binding import LABELS, label_number
from sgtm.integrations.settings import check_masking, space_of


class SgtmCollator:
    """A data collator that adds `sgtm_labels`, the applied label of each sequence, to the batch of another.

    collator  any collator that makes one sequence of each example
    masking   what `apply_sgtm` got
    column    of each example: one label, as a name (`forget:bio`) or a number

    The labels are a tuple of numbers on the host: a tensor on a device would have to be waited for.
    Raises ValueError for examples without the column, for unknown labels and labels of single tokens, and where the
    collator packs examples into another number of sequences.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], Any],
        masking: MaskingConfig | Mapping[str, Any],
        column: str = LABELS,
    ):
        self.collator, self.column = collator, column
        self.space = space_of(check_masking(masking))

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        labels = tuple(self._label(index, example) for index, example in enumerate(examples))
        others = [{key: value for key, value in example.items() if key != self.column} for example in examples]
        batch = self.collator(others)
        sequences = len(batch["input_ids"])
        if sequences != len(labels):
            raise ValueError(
                f"the collator made {sequences} sequences of {len(labels)} examples; a label is one of a whole "
                f"sequence, so use a collator that does not pack"
            )
        batch[LABELS] = labels
        return batch

    def _label(self, index: int, example: Mapping[str, Any]) -> int:
        if self.column not in example:
            raise ValueError(
                f"example {index} of the batch has no column {self.column!r}, only {', '.join(map(str, example))}; "
                f"give the data one, and in a Trainer use SgtmTrainerMixin, which keeps it"
            )
        return label_number(example[self.column], self.space)
