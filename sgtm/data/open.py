"""From a config to its corpus."""

from __future__ import annotations

from typing import Literal

from sgtm.config.schema import Config
from sgtm.data.store import Corpus
from sgtm.data.synthetic import open_synthetic


def open_corpus(config: Config, verify: Literal["hashes", "sizes"] = "hashes", *, write: bool = True) -> Corpus:
    """The corpus that `data.path` names; `synthetic` is `<runs>/synthetic-<vocab_size>`.

    verify  see `Corpus.open`
    write   whether `synthetic` is written where it is missing, damaged or of another edition; what reads a run's
            results passes False, because an evaluation must not make its own data

    Raises ValueError where it is missing, damaged or unfinished.
    """
    if config.data.path == "synthetic":
        return open_synthetic(config.runs, config.model.vocab_size, verify, write=write)
    return Corpus.open(config.data.path, verify)
