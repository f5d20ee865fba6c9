"""The loss of every token of a text, and the texts of a file.

A text is read as one document: in pieces of a context, each token from those before it in its piece, but for the first
token of the text, which follows from nothing. An evaluation cuts its sequences in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path

import torch
import torch.nn.functional as F

from sgtm.data.discover import open_sources
from sgtm.data.rules import checked, lookup
from sgtm.evaluation.passages import Passage, token_texts
from sgtm.inference.text_model import TextModel

FIELD = "text"


@torch.no_grad()
def token_losses(model: TextModel, ids: Sequence[int], context: int | None = None) -> torch.Tensor:
    """Loss in nats of each token after the first, float32 [len(ids) - 1].

    context  of the pieces; None: that of the model
    """
    size, targets = context or model.context, torch.tensor(ids[1:], dtype=torch.int64)
    losses = torch.empty(len(targets))
    for start in range(0, len(targets), size):
        piece = slice(start, min(start + size, len(targets)))
        goals, of_piece = targets[piece], losses[piece]
        for part, logits in model.logits(ids[piece]):
            of_piece[part] = F.cross_entropy(logits, goals[part].to(logits.device), reduction="none").cpu()
    return losses


def passage(model: TextModel, category: str, ids: Sequence[int], losses: dict[str, torch.Tensor]) -> Passage:
    """Losses of a text as a report draws them.

    category  what the text is called
    losses    by model, as `token_losses` returns them; one that is not finite becomes None
    """
    rounded: dict[str, list[float | None]] = {
        name: [None, *(round(loss, 4) if isfinite(loss) else None for loss in values.tolist())]
        for name, values in losses.items()
    }
    return {"category": category, "tokens": token_texts(model.tokenizer, ids), "losses": rounded}


def read_texts(path: str | Path) -> Iterator[tuple[str, str]]:
    """(where, text) of every document of a file or folder: a .txt file is one, a record's is its field `text`.

    Formats are those of `sgtm prepare`. Raises ValueError for what cannot be read, naming file and line, and for a
    record without text.
    """
    for source in open_sources([path]):
        for block in source.blocks([FIELD]):
            for record in block.records():
                text = lookup(record.fields, FIELD, record.where)
                if not isinstance(text, str):
                    raise ValueError(f"{record.where}: field {FIELD!r} holds {type(text).__name__}, expected text")
                yield record.where, checked(text, "the text", record.where)
