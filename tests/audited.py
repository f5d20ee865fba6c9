"""Exports to audit, and how a folder is changed so that its record lists what it holds now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from corpora import build, mixed_records
from exports import GPT_NEO, LLAMA, MIXTRAL, SHARED_EXPERTS, make_run
from safetensors.torch import load_file, save_file

from sgtm.hf.card import RECORD, card
from sgtm.hf.export import CARD
from sgtm.run.evaluate import evaluate_run, write_summary

LABELS = {"en": "retain", "es": "forget:es", "web": "forget:fr"}
TEXTS = {"gpt_neo": GPT_NEO, "llama": LLAMA, "mixtral": MIXTRAL, "shared experts": SHARED_EXPERTS}


def evaluated_run(folder: Path, family: str) -> Path:
    """A run of random weights with a corpus and the losses of both."""
    corpus = build(folder / "corpus", mixed_records(), LABELS)
    make_run(folder / "run", TEXTS[family] + f"data: {{path: {corpus.path}}}\n", corpus.fingerprint)
    write_summary(folder / "run", evaluate_run(folder / "run"))
    return folder / "run"


def relist(folder: Path) -> None:
    """Let the record list the files as they are now."""

    def listed(record: dict) -> None:
        files = sorted(path for path in folder.iterdir() if path.name != RECORD and path.is_file())
        record["files"] = {
            path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in files
        }

    change_json(folder / RECORD, listed)


def change_json(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content, indent=1 if file.name == RECORD else 2) + "\n")


def change_record(folder: Path, change: Callable[[dict], object]) -> None:
    """Also the card, which is made from it, and the hashes: only what the run says can contradict it."""
    change_json(folder / RECORD, change)
    (folder / CARD).write_text(card(json.loads((folder / RECORD).read_text()), folder.name))
    relist(folder)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], metadata: dict | None = None):
    """Of a folder with one file of weights."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata or {"format": "pt"})
    relist(folder)
