"""Which runs can be compared: equal in tokens, data, tokenizer and what they are evaluated on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from sgtm.config.errors import ConfigError
from sgtm.config.schema import Config
from sgtm.data.loader import check_corpus, check_domains_trained, isolates_documents
from sgtm.data.open import open_corpus
from sgtm.data.store import TOKENIZER, Corpus
from sgtm.estimate.stages import check_divides
from sgtm.model.direction import direction_of
from sgtm.run.evaluate import check_held_out
from sgtm.sweep.file import Run, Sweep

SYNTHETIC = "synthetic"
ALWAYS = "losses per token could not be compared"


@dataclass(frozen=True)
class Basis:
    """What the losses of a run rest on; each value is (what is compared, the same in words for a message)."""

    tokens: tuple[object, str]
    data: tuple[object, str]
    tokenizer: tuple[object, str]
    held_out: tuple[object, str]
    evaluation: tuple[object, str]


KEYS = {
    "tokens": "train.steps x train.tokens_per_step",
    "data": "data.path",
    "tokenizer": "the tokenizer of data.path",
    "held_out": "the held-out documents of data.path",
    "evaluation": "the held-out sequences (model.context, train.eval_sequences, data.isolate_documents, data.mixing)",
}


def open_corpora(sweep: Sweep, write: bool = False) -> dict[str, Corpus | None]:
    """The corpus of each run by its name, sizes checked; None for a synthetic one that is not written yet.

    write  write synthetic ones first. Raises ConfigError naming the run whose corpus, or file of
           `steering.direction`, is missing or does not fit.
    """
    opened: dict[tuple, Corpus | None] = {}
    corpora: dict[str, Corpus | None] = {}
    for run in sweep.runs:
        source = _source(run.config)
        try:
            if source not in opened:
                opened[source] = _open(run.config, write)
            corpus = opened[source]
            if corpus is not None:
                check_corpus(corpus, run.config)
            direction_of(run.config)
        except ValueError as error:
            raise ConfigError(f"{sweep.file}: run {run.name}: {error}") from None
        corpora[run.name] = corpus
    return corpora


def check_ranks(sweep: Sweep, ranks: int) -> None:
    """Raise ConfigError naming the run whose steps do not divide among its ranks."""
    for run in sweep.runs:
        try:
            check_divides(run.config, ranks)
        except ValueError as error:
            raise ConfigError(f"{sweep.file}: run {run.name}: {error}") from None


def check_adjacent(sweep: Sweep, corpora: dict[str, Corpus | None]) -> None:
    """Raise ConfigError where an adjacent category is not in a corpus, or is a domain's."""
    for corpus in {corpus.path: corpus for corpus in corpora.values() if corpus is not None}.values():
        retained = [name for name, label in corpus.categories.items() if not label.startswith("forget:")]
        for category in sweep.adjacent:
            if category not in retained:
                raise ConfigError(
                    f"{sweep.file}: adjacent: {category!r} is no category of {corpus.path} that is retained; those are "
                    f"{', '.join(retained)}"
                )


def check_measured(sweep: Sweep, corpora: dict[str, Corpus | None]) -> None:
    """Raises ConfigError naming the run of whose losses a part could not be measured, or whose masks have no text."""
    for run in sweep.runs:
        corpus = corpora[run.name]
        try:
            if corpus is not None:
                check_held_out(corpus, run.config)
                check_domains_trained(corpus, run.config)
        except ValueError as error:
            raise ConfigError(f"{sweep.file}: run {run.name}: {error}") from None


def check_comparable(sweep: Sweep, corpora: dict[str, Corpus | None]) -> None:
    """Raise ConfigError naming two runs and the key where their losses cannot be compared.

    A variant is not compared in what its `may_differ` names; all others must agree. Another tokenizer or other held-out
    documents are never allowed.
    """
    distinct = {corpus.path: corpus for corpus in corpora.values() if corpus is not None}
    held_out = {path: _held_out(corpus) if len(distinct) > 1 else "" for path, corpus in distinct.items()}
    bases = [(run, _basis(run.config, corpora[run.name], held_out)) for run in sweep.runs]
    for aspect, key in KEYS.items():
        bound = [(run, getattr(basis, aspect)) for run, basis in bases if aspect not in sweep.may_differ[run.variant]]
        for run, (value, shown) in bound:
            first, (expected, other) = bound[0]
            if value != expected:
                raise ConfigError(_refusal(sweep, aspect, key, (first, other), (run, shown)))


def _refusal(sweep: Sweep, aspect: str, key: str, first: tuple[Run, str], second: tuple[Run, str]) -> str:
    (one, its), (two, others) = first, second
    remedy = "give both the same"
    if aspect in ("tokens", "data", "evaluation"):
        remedy += f", or allow it on purpose with may_differ: {{{two.variant}: [{aspect}]}}"
    else:
        remedy += f", as {ALWAYS}"
    return f"{sweep.file}: {one.name} and {two.name} differ in {key}: {its} and {others}; {remedy}"


def _source(config: Config) -> tuple:
    synthetic = config.data.path == SYNTHETIC
    return (SYNTHETIC, config.runs, config.model.vocab_size) if synthetic else (str(Path(config.data.path).resolve()),)


def _open(config: Config, write: bool) -> Corpus | None:
    try:
        return open_corpus(config, "sizes", write=write)
    except ValueError:
        if config.data.path != SYNTHETIC or write:
            raise
        return None


def _held_out(corpus: Corpus) -> str:
    """Digest of the test split: ids (hashes of the text) and categories of its documents, whatever their order."""
    documents = corpus.documents[corpus.select("test")]
    names = list(corpus.categories.items())
    lines = sorted(f"{row['id']} {names[row['category']]}" for row in documents)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _basis(config: Config, corpus: Corpus | None, held_out: dict[Path, str]) -> Basis:
    train = config.train
    tokens = train.steps * train.tokens_per_step
    if corpus is None:
        name = f"the synthetic corpus with a vocabulary of {config.model.vocab_size:,}"
        data = tokenizer = held = (name, name)
        # One that is not written yet is known by its vocabulary: the stories are the same everywhere.
    else:
        words = corpus.manifest.files[TOKENIZER].sha256
        data = (corpus.fingerprint, f"{corpus.path} ({corpus.fingerprint[:12]})")
        tokenizer = (words, f"{words[:12]}, {corpus.vocab_size:,} entries")
        held = (held_out[corpus.path], f"{held_out[corpus.path][:12]} in {corpus.path}")
    context, isolated = config.model.context, isolates_documents(config.data)
    evaluation = (context, train.eval_limit, isolated)
    shown = f"{train.eval_limit or 'all'} of {context} tokens{', documents isolated' if isolated else ''}"
    arithmetic = f"{train.steps:,} x {train.tokens_per_step:,} = {tokens:,}"
    return Basis((tokens, arithmetic), data, tokenizer, held, (evaluation, shown))
