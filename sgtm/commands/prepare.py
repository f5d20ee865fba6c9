"""`sgtm prepare`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sgtm.commands.options import COUNT, Subcommands

SOURCES = (
    "files or folders: txt, JSON lines or arrays, csv, tsv (plain, gz, bz2, xz, zst), parquet, saved Hugging Face "
    "datasets; other kinds of files in a folder are counted and printed (required)"
)
RULES = "YAML file: which field holds text, category and split, and the true label of each category (docs/data.md)"
OUT = "folder of the corpus; an interrupted run with the same inputs continues where it was"
TOKENIZER = (
    "folder with tokenizer.json, or with GPT-2's encoder.json and vocab.bpe; the default, the word train, trains a "
    "byte-level BPE on the data"
)


def add(commands: Subcommands) -> None:
    about = "turn labelled text into a corpus that sgtm train reads"
    # The defaults are those of PrepareOptions, which is not imported before the command runs.
    parser = commands.add("prepare", run, about, argument_default=argparse.SUPPRESS)
    # Not required by argparse, so that one message lists all that is missing and what it takes.
    data = parser.add_argument("sources", nargs="+", type=Path, metavar="DATA", help=SOURCES, default=())
    data.required = False
    parser.add_argument("--rules", type=Path, metavar="FILE", help=f"{RULES} (required)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"{OUT} (required)")
    parser.add_argument("--tokenizer", metavar="FOLDER|train", help=TOKENIZER)
    vocab_size = "entries of a trained tokenizer (default: 4096)"
    parser.add_argument("--vocab-size", "--vocab_size", type=COUNT, metavar="N", help=vocab_size)
    parser.add_argument("--workers", type=_workers, metavar="N", help="processes (default: 0, one per core)")
    shard_tokens = "tokens of a shard file, and of the longest document (default: 2**26)"
    parser.add_argument("--shard-tokens", "--shard_tokens", type=COUNT, metavar="N", help=shard_tokens)
    overwrite = "replace a finished corpus made from something else; it stays until the new one is complete"
    parser.add_argument("--overwrite", action="store_true", help=overwrite)


def run(options) -> None:
    from sgtm.data.prepare import PrepareOptions, run_prepare

    values = {name: getattr(options, name) for name in PrepareOptions.__dataclass_fields__ if hasattr(options, name)}
    run_prepare(PrepareOptions(**values))


def _workers(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 for one per core, got {text!r}")
    return int(text)
