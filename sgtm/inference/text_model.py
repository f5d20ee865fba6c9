"""Models that read text: one interface to a run without some domains and to an exported folder, both in fp32.

Text is read as in training: no BOS in front, no EOS behind, strings of control tokens spelled out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer

from sgtm.config.schema import Config
from sgtm.data.loader import check_corpus
from sgtm.data.open import open_corpus
from sgtm.data.plain_text import as_text, plain_text
from sgtm.data.rules import checked
from sgtm.data.store import Corpus
from sgtm.data.tokenizer import eos_token, load_tokenizer, vocabulary_size
from sgtm.distributed.env import device_type, use_deterministic_algorithms
from sgtm.evaluation.subject import Subject
from sgtm.inference.sources import ModelSource
from sgtm.masking.labels import removal_name
from sgtm.run.checkpoint import check_same_corpus, open_run, read_manifest
from sgtm.run.evaluate import check_precision, load_bases, load_model
from sgtm.run.located import check_data


class TextModel(ABC):
    """name: what output calls it. tokenizer: encodes as in training. context: tokens that it can read at once.
    eos_id: of the token that ends a text."""

    def __init__(self, name: str, tokenizer: Tokenizer, context: int, eos_id: int):
        self.name, self.tokenizer, self.context, self.eos_id = name, tokenizer, context, eos_id

    @cached_property
    def vocabulary(self) -> int:
        """One more than the largest id that stands for a token; the model may have more logits."""
        return vocabulary_size(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Raises ValueError for text that is no Unicode."""
        return self.tokenizer.encode(checked(text, "it", "text")).ids

    @abstractmethod
    def logits(self, ids: Sequence[int], last: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
        """fp32 logits [n, V] of stretches of the next tokens after each of at most `context` ids, in order.

        last  of the next token after the last one alone
        """


class RunModel(TextModel):
    """A run's model, and without some domains: their groups are inactive, or the adapters left out.

    full  the model with all domains
    """

    def __init__(self, full: Subject):
        corpus, context = full.corpus, full.config.model.context
        end = corpus.tokenizer.id_to_token(corpus.eos_id)
        assert end is not None  # the corpus took the id from this tokenizer
        tokenizer = plain_text(corpus.tokenizer, {end, *corpus.token_names.values()})
        super().__init__(removal_name(()), tokenizer, context, corpus.eos_id)
        self.full = self.subject = full

    def without(self, removed: tuple[str, ...], name: str | None = None) -> RunModel:
        """The same weights without these domains, as `ModelSource.removed` gives them."""
        other = copy(self)
        other.name, other.subject = name or removal_name(removed), self.full.without(*removed)
        return other

    def logits(self, ids: Sequence[int], last: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
        tensor = torch.tensor([ids], dtype=torch.int64, device=self.subject.device)
        hidden = self.subject.hidden(tensor, self.subject.plan(tensor))
        yield from (hidden._replace(x=hidden.x[-1:]) if last else hidden).logits()


class FolderModel(TextModel):
    """A Hugging Face folder in transformers, by none of our code."""

    def __init__(self, folder: Path, name: str | None = None):
        from sgtm.hf.transformers_model import load_in_transformers  # imports transformers: a second or two

        tokenizer = as_text(load_tokenizer(folder))
        try:
            self.model = load_in_transformers(folder).to(device_type())
        except Exception as error:  # as `load_in_transformers` says, of many kinds
            raise ValueError(f"{folder} does not load in transformers: {error}") from None
        config = self.model.config
        if (entries := vocabulary_size(tokenizer)) > config.vocab_size:
            raise ValueError(
                f"{folder}: tokenizer.json has {entries} entries, the model {config.vocab_size}; copy both from one"
            )
        end = tokenizer.token_to_id(eos_token(tokenizer, folder))
        assert end is not None  # `eos_token` takes the name from the vocabulary
        super().__init__(name or str(folder), tokenizer, config.max_position_embeddings, end)

    def logits(self, ids: Sequence[int], last: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
        logits = self.model(torch.tensor([ids], device=self.model.device), use_cache=False).logits[0].float()
        yield slice(0, 1 if last else len(ids)), logits[-1:] if last else logits


def open_models(
    source: ModelSource, removals: Sequence[tuple[str, ...]] = ((),), names: Sequence[str] | None = None
) -> list[TextModel]:
    """The source without each of these sets of domains, which share their weights.

    removals  as `ModelSource.removed` gives them; names: of the models

    A run's model is that of its newest valid checkpoint. Raises ValueError where there is none, where the corpus of the
    run, which has the tokenizer, is gone or another one, and for a folder that does not load.
    """
    named = list(names or (None for _ in removals))
    if source.config is None:
        return [FolderModel(source.path, name) for name in named]
    full = open_run_model(source, removes=any(removals))
    return [full.without(removed, name) for removed, name in zip(removals, named, strict=True)]


def open_run_model(source: ModelSource, removes: bool = True) -> RunModel:
    """The full model of a run, whose `without` has the same weights.

    removes  whether domains will be removed from it: of a run with adapters, the model without them is loaded too

    Raises ValueError as `open_models`.
    """
    config, checkpoint = open_run(source.path, source.data)
    corpus = _corpus(source, config, checkpoint)
    if device_type() == "cuda" and config.kernels.deterministic:
        use_deterministic_algorithms()
    check_precision(config, "fp32")
    bases = load_bases(config, checkpoint) if removes else {}
    return RunModel(Subject(load_model(config, checkpoint).eval(), corpus, config, bases=bases))


def _corpus(source: ModelSource, config: Config, checkpoint: Path) -> Corpus:
    """Of which the tokenizer is read alone, so that its shards are not hashed."""
    try:
        corpus = open_corpus(config, "sizes", write=False)
    except ValueError:
        check_data(config, source.path, source.data)  # whose message has the remedy
        raise
    check_corpus(corpus, config)
    check_same_corpus(source.path, read_manifest(checkpoint), corpus.path, corpus.fingerprint)
    return corpus
