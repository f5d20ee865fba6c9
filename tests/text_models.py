"""Models that read text: a run of random weights on a corpus of bytes, and one whose next token follows from a rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from corpora import build, record
from exports import GPT_NEO, make_run

from sgtm.data.plain_text import plain_text
from sgtm.data.store import Corpus
from sgtm.data.tokenizer import EOS, train_bpe
from sgtm.inference.text_model import TextModel

LABELS = {"en": "retain", "es": "forget:es", "fr": "forget:fr"}


def byte_run(folder: Path, text: str = GPT_NEO, name: str = "run", seed: int = 0) -> Path:
    """A run directory of random weights, 2 layers and a context of 16 by default, and beside it its corpus, in which a
    token is a byte.

    seed  above 0: other weights
    """
    corpus = folder / "corpus"
    if not corpus.exists():
        records = [record(n, category, 40, split) for n, split in enumerate(("train", "test")) for category in LABELS]
        build(corpus, records, LABELS)
    run = folder / name
    make_run(run, text + f"data: {{path: {corpus}}}\n", Corpus.open(corpus).fingerprint, seed=seed)
    return run


class Bigrams(TextModel):
    """The logits of the next token follow from the last one alone; a token is a byte.

    logits  [257, V]; calls: forward passes
    """

    def __init__(self, logits: torch.Tensor, name: str = "bigrams", context: int = 64):
        tokenizer = train_bpe([], 257)
        eos = tokenizer.token_to_id(EOS)
        super().__init__(name, plain_text(tokenizer, {EOS}), context, eos)
        self.table, self.calls = logits, 0

    def logits(self, ids: Sequence[int], last: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
        self.calls += 1
        assert 0 < len(ids) <= self.context
        rows = self.table[torch.tensor(ids)]
        yield slice(0, 1 if last else len(ids)), rows[-1:] if last else rows


def successors(pairs: dict[str, str], default: str = "a") -> torch.Tensor:
    """Logits [257, 257] of `Bigrams`: behind each character this one is the most likely, by 10; `EOS` ends the text."""
    tokenizer = train_bpe([], 257)
    table = torch.zeros(257, 257)
    for i in range(257):
        token = tokenizer.id_to_token(i)
        table[i, tokenizer.token_to_id(pairs.get(token, default))] = 10.0
    return table
