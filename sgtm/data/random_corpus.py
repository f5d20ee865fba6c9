"""Random tokens in the place of a prepared corpus, for what measures time and learns nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sgtm.config.schema import Config
from sgtm.data.store import DOCUMENT, SPAN, Corpus, Manifest

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
        found = np.random.default_rng(document).integers(1, self.vocab_size, length, dtype=np.uint32)
        found[-1] = self.eos_id
        return found[start : length if end is None else end]
