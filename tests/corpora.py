"""Small corpora for tests. With a vocabulary of 257 a token is a byte: a document has len(text.encode()) + 1."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgtm.config.schema import Config
from sgtm.data.prepare import prepare
from sgtm.data.readers import Record, Source, SourceBlock
from sgtm.data.rules import Rules
from sgtm.data.store import Corpus

BYTES = 257
LABELS = {"en": "retain", "es": "forget:es", "web": "unlabeled"}
SPAN_LABELS = {"web": "retain", "toxin": "forget:es", "rumour": "unlabeled"}
"""Of the documents of `spanned`."""


@dataclass(frozen=True)
class Records(Source):
    """Records given in memory, in one block."""

    records_: tuple[dict, ...]
    size: int = 1
    progress: int = 1

    def fingerprint(self) -> Any:
        return list(self.records_)

    def blocks(self, columns: Sequence[str]) -> Iterator[SourceBlock]:
        yield self

    def records(self) -> Iterator[Record]:
        for number, fields in enumerate(self.records_):
            yield Record("memory", f"record {number}", fields)


def record(number: int, category: str = "en", length: int = 20, split: str = "train", **fields) -> dict:
    """A record whose text is a number, unlike any other, and dots up to `length` bytes."""
    return {"text": f"{category}{number:06d}".ljust(length, "."), "category": category, "split": split, **fields}


def mixed_records(per_category: int = 60) -> list[dict]:
    """Documents of three categories with odd lengths, and a few of each for the test split."""
    return [
        record(number, category, 9 + 7 * number % 41, "test" if number % 10 == 0 else "train")
        for number in range(per_category)
        for category in LABELS
    ]


def spanned(number: int, split: str) -> dict:
    """A document whose capitals are in spans: `toxin` from the first or a later character on, `rumour` at the end."""
    before, toxin, rumour = "ab" * (number % 4), "X" * (1 + 5 * number % 23), "Y" * (number % 3)
    text = f"{before}{toxin}cd{rumour}"
    spans = [[len(before), len(before) + len(toxin), "toxin"]]
    spans += [[len(text) - len(rumour), len(text), "rumour"]] if rumour else []
    return {"text": text, "category": "web", "split": split, "spans": spans}


def spanned_corpus(out: Path) -> Corpus:
    """Thirty documents in each split, every one with labelled spans."""
    return build(out, [spanned(number, split) for number in range(30) for split in ("train", "test")], SPAN_LABELS)


def build(out: Path, records: Sequence[dict], labels: dict[str, str] | None = None, **options) -> Corpus:
    rules = {"split": {"field": "split"}, "labels": labels or LABELS}
    if any("spans" in fields for fields in records):
        rules["spans"] = "spans"
        records = [{"spans": [], **fields} for fields in records]
    source = Records(tuple(records))
    return prepare([source], Rules.model_validate(rules), "train", out, vocab_size=BYTES, workers=1, **options)


def config_for(
    context: int = 16,
    sequences: int = 8,
    micro_batch: int = 2,
    domains: Sequence[str] = ("es",),
    steps: int = 1000,
    **data,
) -> Config:
    """A config whose steps have this many sequences; `data` are keys of its data section."""
    return Config.model_validate(
        {
            "model": {
                "layers": 1,
                "hidden_size": 16,
                "heads": 4,
                "intermediate_size": 16,
                "vocab_size": BYTES,
                "context": context,
            },
            "masking": {"domains": list(domains), "forget_neurons": 2, **data.pop("masking", {})},
            "optimizer": data.pop("optimizer", {}),
            "data": data,
            "train": {"steps": steps, "tokens_per_step": sequences * context, "micro_batch": micro_batch},
        }
    )


def write_jsonl(path: Path, records: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(fields, ensure_ascii=False) + "\n" for fields in records), encoding="utf-8")
    return path


def texts(corpus: Corpus) -> list[str]:
    """Every document's text, its EOS checked and cut off."""
    strings = []
    for document in range(len(corpus.documents)):
        tokens = corpus.tokens(document).tolist()
        assert tokens.pop() == corpus.eos_id
        strings.append(corpus.tokenizer.decode(tokens))
    return strings


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that belongs to a corpus."""
    names = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in ("job.json", ".lock")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in names}
