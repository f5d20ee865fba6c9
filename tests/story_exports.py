"""Exports of runs with random weights and a corpus of stories, with tokenizers as people have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from corpora import write_jsonl
from exports import make_run
from tokenizer_folders import BOS, KINDS, PAD, STORIES, write_folder

from sgtm.data.discover import open_sources
from sgtm.data.prepare import prepare
from sgtm.data.rules import Rules
from sgtm.data.tokenizer import EOS
from sgtm.hf.export import export_run

RULES = Rules.model_validate(
    {"category": {"constant": "en"}, "labels": {"en": "retain"}, "split": {"constant": "train"}}
)
VOCABULARY = 640
"""Rows of the embedding: more than any of the tokenizers has tokens."""


def export_of_stories(
    folder: Path, text: str, kind: str = "ours", remove: Sequence[str] = ("es",), prune: bool = True
) -> Path:
    """The export's folder of a run with the config `text` and a tokenizer of this kind; `folder` is made."""
    folder.mkdir(exist_ok=True)
    tokenizer = write_folder(folder / "tokenizer", KINDS[kind][0](), eos_token=EOS, pad_token=PAD, bos_token=BOS)
    source = write_jsonl(folder / "a.jsonl", [{"text": story} for story in STORIES])
    corpus = prepare(open_sources([source]), RULES, tokenizer, folder / "corpus", workers=1)
    text = text.replace("vocab_size: 257", f"vocab_size: {VOCABULARY}").replace("context: 16", "context: 64")
    make_run(folder / "run", text + f"data: {{path: {folder / 'corpus'}}}\n", corpus.fingerprint)
    return export_run(folder / "run", remove, folder / "out", prune=prune)
