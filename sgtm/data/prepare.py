"""`sgtm prepare`: from labelled text to a corpus.

Three stages: a tokenizer (trained on a sample, or loaded), the blocks (in parallel, each a file of its own), and the
merge of the blocks, in order, into shards and index; the manifest comes last. `job.json` beside them records from what:
run again with the same inputs, rules and tokenizer, the stages that were finished are reused
(`sgtm/data/folder.py`).

The promises: the corpus depends on the input's content and order, not on the number of workers or interruptions; a
folder that was not finished does not open; a finished one is never overwritten unless asked, and then stays until the
new one is complete (`tests/processes/test_prepare_resume.py`).
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from sgtm.data.discover import READABLE, find_sources
from sgtm.data.encode import EncodedBlock, Encoder, block_file, encode_blocks
from sgtm.data.folder import blocks_of, clear, folder_to_build, locked, put_in_place, same_job, stored_job
from sgtm.data.plain_text import plain_text, reachable
from sgtm.data.readers import Source, SourceBlock
from sgtm.data.rules import Rules, load_rules, stable_id
from sgtm.data.store import MANIFEST, TOKEN_NAMES, TOKENIZER, Corpus
from sgtm.data.summary import repeated_names, summary, warnings
from sgtm.data.tokenizer import (
    eos_token,
    load_tokenizer,
    named_tokens,
    read_from,
    sample_texts,
    tokenizer_files,
    train_bpe,
    vocabulary_size,
)
from sgtm.data.writer import CorpusWriter
from sgtm.files import sha256_of, write_atomically
from sgtm.process.cores import usable_cores
from sgtm.words import counted

TRAIN = "train"
SAMPLE_BYTES = 32 * 2**20
SHARD_TOKENS = 2**26

Advance = Callable[[int], None]
"""Takes the bytes of input that are done."""


@dataclass
class PrepareOptions:
    """The options of `sgtm prepare`, which sgtm/commands/prepare.py describes; others as those of `prepare`."""

    sources: Sequence[Path]
    rules: Path | None = None
    out: Path | None = None
    tokenizer: str = TRAIN
    vocab_size: int = 4096
    workers: int = 0
    shard_tokens: int = SHARD_TOKENS
    overwrite: bool = False


def run_prepare(options: PrepareOptions) -> None:
    """The command: prepares, and prints what was found. Raises ValueError or OSError for mistakes of the user."""
    rules_file, out = options.rules, options.out
    if not options.sources or rules_file is None or out is None:
        required = _required(options)
        missing = [name for name, (value, _) in required.items() if not value]
        described = "\n".join(f"  {name:8}{about}" for name, (_, about) in required.items())
        raise ValueError(
            f"sgtm prepare: no {', no '.join(missing)}; write: sgtm prepare DATA... --rules FILE --out FOLDER\n"
            f"{described}"
        )
    rules = load_rules(rules_file)
    corpus = prepare_files(
        options.sources,
        rules,
        out,
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        workers=options.workers,
        shard_tokens=options.shard_tokens,
        overwrite=options.overwrite,
        progress=True,
    )
    Console().print(summary(corpus))
    for warning in warnings(corpus, rules):
        Console(stderr=True).print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)


def prepare_files(
    data: str | Path | Sequence[str | Path],
    rules: str | Path | Rules,
    out: str | Path,
    *,
    tokenizer: str | Path = TRAIN,
    vocab_size: int = 4096,
    workers: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    progress: bool = False,
) -> Corpus:
    """Files and folders to a corpus in the folder `out`: `sgtm.prepare`, and what the command calls.

    rules     a rule file, or `Rules`
    progress  print which files are read, and bars
    The other options are those of `prepare`, which raises the errors.
    """
    sources, account = find_sources([data] if isinstance(data, (str, Path)) else data)
    rules = rules if isinstance(rules, Rules) else load_rules(rules)
    if progress:
        for line in account.lines():
            Console().print(line, markup=False, highlight=False, soft_wrap=True)
    return prepare(
        sources,
        rules,
        tokenizer,
        out,
        vocab_size=vocab_size,
        workers=workers,
        shard_tokens=shard_tokens,
        overwrite=overwrite,
        progress=progress,
    )


def _required(options: PrepareOptions) -> dict[str, tuple[object, str]]:
    """What was given for each argument that must be, and what it takes."""
    return {
        "DATA": (options.sources, f"files and folders of {READABLE}"),
        "--rules": (options.rules, "YAML file with the true label of each category; docs/data.md has examples"),
        "--out": (options.out, "folder of the corpus, what data.path of the training names"),
    }


def prepare(
    sources: Sequence[Source],
    rules: Rules,
    tokenizer: str | Path,
    out: str | Path,
    *,
    vocab_size: int = 4096,
    workers: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    progress: bool = False,
) -> Corpus:
    """Prepares a corpus, or continues an interrupted run, or opens the corpus when it is finished already.

    tokenizer   `train`, or the folder of one
    vocab_size  of a trained tokenizer
    workers     processes; 0: one per core this process may use; 1: in this process

    Raises ValueError naming file and line for input that the rules refuse, or where `out` holds something else.
    """
    out = Path(out)
    if workers < 0 or shard_tokens < 1:
        raise ValueError(f"workers must be 0 or more and shard_tokens positive, got {workers} and {shard_tokens}")
    workers = workers or usable_cores()
    job = _job(sources, rules, tokenizer, vocab_size)
    with locked(out):
        job = _as_stored(job, stored_job(out))
        folder = folder_to_build(out, job, shard_tokens, overwrite)
        if folder is not None:
            loaded, eos = _tokenizer(sources, rules, tokenizer, vocab_size, folder, progress)
            eos_id = loaded.token_to_id(eos)
            assert eos_id is not None, f"{eos} is not in the vocabulary"
            encoder = Encoder(rules, folder / TOKENIZER, eos_id, vocabulary_size(loaded), shard_tokens)
            blocks = blocks_of(folder, job)
            with _bar(sources, "tokenizing", progress) as advance:
                count = encode_blocks(encoder, _all_blocks(sources, rules), blocks, workers, advance)
            _merge(folder, encoder, blocks, count)
            if folder != out:
                put_in_place(out)
            clear(out)
        elif progress:
            Console().print(f"{out} is complete already; nothing was done", highlight=False, soft_wrap=True)
    return Corpus.open(out)


def open_prepared(
    sources: Sequence[Source],
    rules: Rules,
    tokenizer: str | Path,
    out: str | Path,
    *,
    vocab_size: int = 4096,
    verify: Literal["hashes", "sizes"] = "hashes",
) -> Corpus | None:
    """What `prepare` finished writing from exactly this, or None. Takes no lock and writes nothing.

    Raises ValueError naming the file where the finished corpus is damaged (`verify`: see `Corpus.open`).
    """
    out = Path(out)
    stored = stored_job(out)
    job = _as_stored(_job(sources, rules, tokenizer, vocab_size), stored)
    if not (out / MANIFEST).is_file() or not same_job(stored, job):
        return None
    return Corpus.open(out, verify)


def _job(sources: Sequence[Source], rules: Rules, tokenizer: str | Path, vocab_size: int) -> dict:
    """What the blocks depend on; two runs with the same job may share them."""
    if str(tokenizer) == TRAIN:
        made: dict[str, object] = {"train": vocab_size, "sample_bytes": SAMPLE_BYTES}
    else:
        loaded, names = load_tokenizer(tokenizer), named_tokens(tokenizer)  # their errors come first
        made = {file.name: sha256_of(file) for file in tokenizer_files(tokenizer)}
        # Earlier versions let such strings in a text become control ids; their blocks and corpora are other ones.
        spelled_out = reachable(loaded, {*names.values(), eos_token(loaded, tokenizer)})
        made |= {"spelled_out": spelled_out} if spelled_out else {}
    return {
        "sources": [source.fingerprint() for source in sources],
        "rules": rules.identity(),
        "tokenizer": made,
    }


def _as_stored(job: dict, stored: object) -> dict:
    """`stored` where it is this job, else `job`.

    Earlier versions also listed what else lay in the tokenizer's folder; their corpora stay finished.
    """
    if not isinstance(stored, dict):
        return job
    made = stored.get("tokenizer")
    if not isinstance(made, dict) or stored | {"tokenizer": job["tokenizer"]} != job:
        return job
    read = {name: made[name] for name in read_from(made)}
    return stored if read == job["tokenizer"] else job


def _tokenizer(
    sources: Sequence[Source], rules: Rules, tokenizer: str | Path, vocab_size: int, out: Path, progress: bool
) -> tuple[Tokenizer, str]:
    """The tokenizer as one of text alone, stored in `out`, and its end-of-text token."""
    (out / TOKEN_NAMES).unlink(missing_ok=True)  # of another job
    if str(tokenizer) != TRAIN:
        loaded, names = load_tokenizer(tokenizer), named_tokens(tokenizer)
        eos = eos_token(loaded, tokenizer)
        loaded = plain_text(loaded, {*names.values(), eos})
        names = {key: name for key, name in names.items() if loaded.token_to_id(name) is not None}
        write_atomically(out / TOKENIZER, loaded.to_str())
        write_atomically(out / TOKEN_NAMES, json.dumps(names | {"eos_token": eos}))
        return loaded, eos
    if not (out / TOKENIZER).is_file():
        splits: Counter[str] = Counter()
        with _bar(sources, "sampling for the tokenizer", progress) as advance:
            texts = sample_texts(_training_texts(sources, rules, advance, splits), SAMPLE_BYTES)
        if not texts:
            tally = ", ".join(f"{count:,} in {split}" for split, count in splits.most_common()) or "none at all"
            raise ValueError(
                f"no document with text is in split train, which the tokenizer is made from; found: {tally}"
            )
        write_atomically(out / TOKENIZER, train_bpe(texts, vocab_size).to_str())
    loaded = Tokenizer.from_file(str(out / TOKENIZER))
    return loaded, eos_token(loaded)


def _training_texts(sources: Sequence[Source], rules: Rules, advance: Advance, splits: Counter[str]) -> Iterator[str]:
    """Texts of split `train`; counts the documents of every split in `splits`."""
    for block in _all_blocks(sources, rules):
        for path, where, fields in block.records():
            document = rules.document(fields, path, where)
            if document is not None and document.text.strip():
                splits[document.split] += 1
                if document.split == TRAIN:
                    yield document.text
        advance(block.progress)


def _all_blocks(sources: Sequence[Source], rules: Rules) -> Iterator[SourceBlock]:
    for source in sources:
        yield from source.blocks(rules.columns)


def _merge(out: Path, encoder: Encoder, blocks: Path, count: int) -> None:
    """Blocks, in order, into shards, index and manifest. Raises ValueError where all documents are empty or dropped."""
    splits: list[str] = []
    empty = dropped = total = nul = 0
    first_nul, names = "", []
    shutil.rmtree(out / "shards", ignore_errors=True)
    writer = CorpusWriter(out, encoder.vocab_size, encoder.shard_tokens)
    for number in range(count):
        block = EncodedBlock.load(block_file(blocks, number))
        splits += [str(name) for name in block.splits if str(name) not in splits]
        position = [splits.index(str(name)) for name in block.splits]
        if position:
            block.documents["split"] = [position[split] for split in block.documents["split"]]
        writer.add(block.tokens, block.documents, block.spans)
        empty, dropped, total = empty + block.empty, dropped + block.dropped, total + len(block.documents)
        nul, first_nul = nul + block.nul, first_nul or block.first_nul
        names.append(np.array([stable_id(str(name).encode()) for name in block.names], np.uint64))
    if not total:
        raise ValueError(
            f"no document has any text: {empty:,} are empty, {dropped:,} dropped by the rules; "
            f"look at `text` and at `drop` in the rule file"
        )
    have = counted(nul, "document has", "documents have")
    notes = [f"{have} NUL characters; the first is {first_nul}"] if nul else []
    repeated, documents, first = repeated_names(names)
    if first is not None:
        name = EncodedBlock.load(block_file(blocks, first[0])).names[first[1]]
        occur = counted(repeated, f"value of {encoder.rules.id} occurs", f"values of {encoder.rules.id} occur")
        notes.append(f"{occur} more than once, in {documents:,} documents; the first is {str(name)!r} (rules: id)")
    writer.finish(encoder.eos_id, encoder.rules.categories, splits, empty, dropped, notes)


@contextmanager
def _bar(sources: Sequence[Source], what: str, progress: bool) -> Iterator[Advance]:
    """A progress bar over the input's bytes; yields the function that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task(what, total=sum(source.size for source in sources))
        yield lambda done: bar.advance(task, done)
