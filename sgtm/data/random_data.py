"""Random tokens in place of a prepared corpus, for steps that measure or check and learn nothing."""

from __future__ import annotations

from itertools import cycle, islice, pairwise
from pathlib import Path

import numpy as np
import torch

from sgtm.config.schema import Config
from sgtm.data.batch import Batch
from sgtm.data.loader import isolates_documents
from sgtm.data.store import DOCUMENT, SPAN, Corpus, Manifest
from sgtm_kernels.plan import MAX_SLICES

DOCUMENTS, LENGTH = 1000, 500
MOST_DOCUMENTS = 50_000


class RandomCorpus(Corpus):
    """Documents of random tokens, as many of retain data as of each domain, enough for a few steps of this config.

    Read by the ordinary loader, so that labels, packing and mixing are those of the config. Lengths are 250 to 750
    tokens, or more where a label that the channel rarely applies would fill no step.
    """

    def __init__(self, config: Config):
        labels = {"retain": "retain", **{domain: f"forget:{domain}" for domain in config.masking.domains}}
        manifest = Manifest(
            vocab_size=config.model.vocab_size,
            eos_id=0,
            shard_tokens=0,
            categories=labels,
            splits=["train", "test"],
            counts={},
            empty=0,
            dropped=0,
            files={},
        )
        rarest = min(channel.matrix[channel.matrix > 0].min() for _, channel in config.channels)
        count = int(min(DOCUMENTS / rarest, MOST_DOCUMENTS))
        length = int(max(LENGTH, 4 * config.train.tokens_per_step / rarest / count))
        documents = np.zeros(count * len(labels), DOCUMENT)
        documents["id"] = np.arange(len(documents))
        documents["category"] = documents["id"] % len(labels)
        documents["length"] = np.random.default_rng(0).integers(length // 2, length * 3 // 2, len(documents))
        super().__init__(Path("random tokens"), manifest, documents, np.zeros(0, SPAN))

    def tokens(self, document: int, start: int = 0, end: int | None = None) -> np.ndarray:
        """Token ids `start:end` of a document, the same at every call."""
        length = int(self.documents[document]["length"])
        ids = np.random.default_rng(document).integers(1, self.vocab_size, length, dtype=np.uint32)
        ids[-1] = self.eos_id
        return ids[start : length if end is None else end]


def label_pieces(config: Config, labels: int) -> list[tuple[int, ...]]:
    """Labels of the pieces of micro-batches: each label alone, and all of them as the mixing lets them meet."""
    pieces: list[tuple[int, ...]] = [(label,) for label in range(labels)]
    mixing, everything = config.data.mixing, cycle(range(labels))
    if mixing == "sequence" and config.micro_batch > 1:
        pieces.append(tuple(islice(everything, config.micro_batch)))
    elif mixing == "token":
        sequences = config.micro_batch
        many = -(-labels * (MAX_SLICES + 1) // sequences)  # of a sequence: more runs of each label than slices are for
        pieces.append(tuple(islice(everything, sequences * min(many, config.model.context))))
    return pieces


def random_batch(config: Config, labels: tuple[int, ...], seed: int = 0) -> Batch:
    """Random tokens with these labels, in pieces of equal length, which are the documents where training has such."""
    size = config.micro_batch, config.model.context
    ids = torch.randint(config.model.vocab_size, size, generator=torch.Generator().manual_seed(seed))
    ends = [ids.numel() * (i + 1) // len(labels) for i in range(len(labels))]
    bounds, documents = list(pairwise((0, *ends))), None
    if isolates_documents(config.data):
        edges = sorted({0, *ends, *range(0, ids.numel(), config.model.context)})
        documents = tuple(pairwise(edges))
    return Batch(
        input_ids=ids,
        targets=ids,
        labels=labels,
        lengths=tuple(end - start for start, end in bounds),
        documents=documents,
        step_targets=config.train.tokens_per_step,
        step_labels=frozenset(labels),
    )
