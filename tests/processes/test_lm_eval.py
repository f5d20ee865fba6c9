"""The example of lm-eval: its tasks hold held-out text, and what it prints of an export is what our model gives.

Commands are those of docs/evaluation.md.

lm-eval is in a folder of its own, where `make test` installs it.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from bare import python_path
from corpora import build, config_for, record, texts
from exports import make_run

from sgtm.config import load_config, save_config
from sgtm.data.store import Corpus
from sgtm.evaluation.subject import Subject, scored
from sgtm.hf.export import export_run
from sgtm.model.transformer import Transformer

ROOT = Path(__file__).parents[2]
LM_EVAL = ROOT / ".venv" / "lm-eval"
"""Written by the Makefile."""
LABELS = {"en": "retain", "es/*": "forget:es", "web": "unlabeled"}
CONTEXT = 16
ODD = ["[1, 2]", "7", "el {{niño}} \n dice: ¡sí! 🍒 ", "y" * CONTEXT, "z" * (2 * CONTEXT), "a"]
"""What a template would change, several windows of the context, a last one that is short, and a single token."""


class Example(NamedTuple):
    corpus: Corpus
    model: Transformer
    run: Path
    tasks: Path
    printed: str


def documented(program: str, paths: dict[str, object]) -> list[str]:
    """Words of the command of a program in docs/evaluation.md, after its name; paths in the place of those there."""
    page = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    section = page[page.index("\n## lm-eval\n") : page.index("\n## Tamper\n")]
    (line,) = re.findall(rf"^{program} (.*)$", section, re.M)
    return [str(paths.get(word, word)) for word in shlex.split(line)]


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Example:
    """The tasks of a run with random weights."""
    folder = tmp_path_factory.mktemp("example")
    records = [record(n, c, 9 + 7 * n % 41, "train" if n % 3 else "test") for n in range(12) for c in ("en", "es/*")]
    records += [{"text": text, "category": "es/*", "split": "test"} for text in ODD] + [record(99, "web")]
    corpus = build(folder / "corpus", records, LABELS)
    config = config_for(context=CONTEXT, path=str(folder / "corpus"))
    save_config(config, folder / "config.yaml")
    model = make_run(folder / "run", (folder / "config.yaml").read_text(), corpus.fingerprint)
    words = documented("python", {"runs/mine": folder / "run", "tasks": folder / "tasks"})
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Example(corpus, model, folder / "run", folder / "tasks", done.stdout)


def held_out(corpus: Corpus, category: str) -> list[str]:
    everything = texts(corpus)
    return [everything[document] for document in corpus.select("test", category)]


def test_tasks_are_the_held_out_documents_of_every_category(example):
    assert {path.name for path in example.tasks.iterdir()} == {"en.jsonl", "en.yaml", "es%2F%2A.jsonl", "es%2F%2A.yaml"}
    for category, name in (("en", "en"), ("es/*", "es%2F%2A")):
        task = yaml.safe_load((example.tasks / f"{name}.yaml").read_text())
        assert task["task"] == f"held_out_{name}"
        (file,) = task["dataset_kwargs"]["data_files"].values()
        lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
        expected = held_out(example.corpus, category)
        assert [line["text"] for line in lines] == expected and len(expected) == (4 if name == "en" else 10)
        size = sum(len(text.encode()) for text in expected)
        counts = f"{len(expected)} documents, {size} tokens, {size} bytes"  # a token is a byte
        assert f"held_out_{name}: {counts}\n" in example.printed


def bits_per_byte(subject: Subject, documents: list[str]) -> float:
    """Of documents alone, each behind an EOS. One longer than the context is read in windows of it: as few as there can
    be, the last of which begins in the one before where it would else be short.
    """
    nats = 0.0
    for text in documents:
        ids = [subject.corpus.eos_id, *subject.corpus.tokenizer.encode(text).ids]
        for start in range(0, len(ids) - 1, CONTEXT):
            end = min(start + CONTEXT, len(ids) - 1)
            first = max(0, end - CONTEXT)
            window, targets = torch.tensor([ids[first:end]]), torch.tensor([ids[first + 1 : end + 1]])
            targets[:, : start - first] = -100
            states = subject.hidden(window, subject.plan(window))
            nats += float(scored(states, targets, torch.zeros_like(targets)).losses.double().sum())
    return nats / math.log(2) / sum(len(text.encode()) for text in documents)


@pytest.mark.skipif(not (LM_EVAL / ".installed").is_file(), reason="no lm-eval: make test installs it")
def test_lm_eval_gives_what_our_model_gives(example, tmp_path):
    export = export_run(example.run, ["es"], tmp_path / "safe")
    paths = {"pretrained=export/safe,dtype=float32": f"pretrained={export},dtype=float32", "tasks": example.tasks}
    command = [sys.executable, "-m", "lm_eval", *documented("lm_eval", paths), "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "results.json")]
    offline = {"PYTHONPATH": python_path(LM_EVAL), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | offline, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("results_*.json")
    results = json.loads(file.read_text())["results"]
    config = load_config(str(example.run / "config.yaml"))
    full, ablated = (Subject(example.model, example.corpus, config, removed) for removed in ((), ("es",)))
    with torch.no_grad():
        for category, name in (("en", "held_out_en"), ("es/*", "held_out_es%2F%2A")):
            expected = bits_per_byte(ablated, held_out(example.corpus, category))
            assert results[name]["bits_per_byte,none"] == pytest.approx(expected, rel=2e-6)
            assert results[name]["byte_perplexity,none"] == pytest.approx(2**expected, rel=1e-5)
            assert bits_per_byte(full, held_out(example.corpus, category)) != pytest.approx(expected, rel=1e-3)
            assert f"{expected:.4f}" in done.stdout or f"{expected:.3f}" in done.stdout
