"""Random texts of a tiny model, for the losses of unlearning."""

from __future__ import annotations

import torch
from tiny import CONTEXT, FORGET, RETAIN, VOCAB, tiny_config

from sgtm.data.batch import IGNORE
from sgtm.masking.strategy import removal_tables
from sgtm.model.transformer import Transformer
from sgtm.unlearning.text import Text
from sgtm_kernels.plan import MaskPlan

CONFIG = tiny_config(model={"layers": 4})


def text(seed: int, label: int = FORGET) -> Text:
    """Three sequences with 5, 3 and 0 targets."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (3, CONTEXT), generator=generator)
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = targets[1, 3:] = targets[2] = IGNORE
    return Text(ids, targets, MaskPlan.uniform(removal_tables(CONFIG.space, ()), label, 3, CONTEXT))


FORGOTTEN, RETAINED = text(1), text(2, RETAIN)


def token_losses(model: Transformer, of: Text) -> list[torch.Tensor]:
    """Of the first two sequences, whose targets are the next tokens, from the logits of all positions."""
    logits = model.logits(of.input_ids, of.plan).log_softmax(-1)
    counts = of.chosen.sum(1).tolist()
    return [torch.stack([-logits[row, i, of.input_ids[row, i + 1]] for i in range(counts[row])]) for row in range(2)]
