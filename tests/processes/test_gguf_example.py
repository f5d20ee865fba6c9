"""examples/gguf: llama.cpp's converter takes an export, and llama.cpp computes from the file what the export does.

LLAMA_CPP names a checkout of llama.cpp, as no package index has its converter. LLAMA_CPP_PYTHON names a folder with the
package llama_cpp, which loads the files; the source archive of llama-cpp-python holds both. What is not named is
skipped. tests/unit/test_to_gguf.py has what needs neither.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bare import python_path
from exports import GPT_NEO, LLAMA, MIXTRAL, SHARED_EXPERTS
from story_exports import VOCABULARY, export_of_stories
from tokenizer_folders import STORIES
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_gguf_available

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "gguf" / "to_gguf.py"
LLAMA_CPP, LLAMA_CPP_PYTHON = (os.environ.get(name) for name in ("LLAMA_CPP", "LLAMA_CPP_PYTHON"))
TIED = ("tie_embeddings: false", "tie_embeddings: true, rope_theta: 500.0")
TWO_EACH = LLAMA.replace("heads: 4, ", "heads: 8, ").replace("{es: [0], fr: [2]}", "{es: [0, 1], fr: 2}")
CASES = {
    "full": (LLAMA, "ours", [], True),
    "pruned": (LLAMA, "ours", ["es"], True),
    "zeroed": (LLAMA, "ours", ["es"], False),
    "tied": (LLAMA.replace(*TIED), "bos-and-eos", ["es"], True),
    "grouped": (TWO_EACH, "not-declared", ["es"], True),
    "wide-heads": (LLAMA.replace("kv_heads: 4", "kv_heads: 4, head_dim: 12"), "eos", ["es", "fr"], True),
    "mixtral": (MIXTRAL, "ours", ["es"], True),
    "shared-experts": (SHARED_EXPERTS, "ours", ["es"], True),
    "shared-experts-tied": (SHARED_EXPERTS.replace(*TIED), "bos", [], True),
}
TEXTS = [
    *(
        "",
        " ",
        "the fox",
        " two  spaces\n",
        "\n\n\n x\n \n",
        "a <|endoftext|> b",
        "<s> <pad> </s> [PAD600]",
        "x\r\ny\r",
    ),
    *(
        "¿Qué? 🍒 it 's , \0 .",
        "don't I'LL 12345 3.14 ٣½²",
        "कान 我想在apple工作",
        "\u200d e\u0301 \u00a0 \u2003 \x85",
        *STORIES,
    ),
]
NEW = 24
"""Tokens to generate."""
needs_llama_cpp = pytest.mark.skipif(not LLAMA_CPP, reason="LLAMA_CPP names no checkout of llama.cpp")


def convert(folder: Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), str(LLAMA_CPP), str(folder), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_llama_cpp
@pytest.mark.skipif(not is_gguf_available(), reason="no package gguf, with which transformers reads the file")
@pytest.mark.parametrize("remove", [[], ["es"]], ids=["full", "zeroed"])
def test_transformers_reads_the_weights_of_the_export_from_the_file(tmp_path, remove):
    """Not of a pruned model, as it takes the file for a Llama, of which transformers 5 refuses the number of heads."""
    folder = export_of_stories(tmp_path, LLAMA, remove=remove, prune=False)
    done = convert(folder, tmp_path / "safe.gguf")
    assert done.returncode == 0, done.stderr
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="safe.gguf", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(VOCABULARY, (2, 16))
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


def test_what_has_no_form_ends_in_one_line(tmp_path):
    for text, kind, problem in [(GPT_NEO, "ours", "llama.cpp has no GPTNeo"), (LLAMA, "unigram", "model is Unigram")]:
        folder = export_of_stories(tmp_path / kind, text, kind)
        done = convert(folder, tmp_path / "safe.gguf")
        assert done.returncode == 1 and done.stderr.startswith("error: ") and problem in done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "safe.gguf").exists()


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.skipif(not LLAMA_CPP_PYTHON, reason="LLAMA_CPP_PYTHON names no folder with llama_cpp")
def test_llama_cpp_computes_encodes_and_generates_what_transformers_does(tmp_path):
    """One process loads all files. Logits differ from exact ones by at most twice as much as those of torch do."""
    torch.manual_seed(0)
    ids = [[5, 1, 300, 77], *(torch.randint(VOCABULARY, (n,)).tolist() for n in (1, 31, 64))]
    folders = {case: export_of_stories(tmp_path / case, *arguments) for case, arguments in CASES.items()}
    for case, folder in folders.items():
        done = convert(folder, tmp_path / f"{case}.gguf")
        assert done.returncode == 0, done.stderr
    (tmp_path / "input.json").write_text(json.dumps({"ids": ids, "texts": TEXTS, "new": NEW}))
    files = [str(tmp_path / f"{case}.gguf") for case in folders]
    command = [sys.executable, str(ROOT / "tests/load_gguf.py"), str(tmp_path / "input.json"), *files]
    environment = {**os.environ, "PYTHONPATH": python_path(str(LLAMA_CPP_PYTHON))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for (case, folder), facts in zip(folders.items(), json.loads(done.stdout).values(), strict=True):
        check(case, folder, facts, ids)


def check(case: str, folder: Path, facts: dict, ids: list[list[int]]) -> None:
    """`facts`: what `load_gguf.loaded` returns of the export's file."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert facts["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS], case
    assert facts["bos"] == facts["eos"] == tokenizer.eos_token_id and facts["adds"] == [False, False], case
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        ours = [model(torch.tensor([tokens])).logits[0] for tokens in ids]
        generated = model.generate(torch.tensor(ids[:1]), max_new_tokens=NEW, do_sample=False)[0, len(ids[0]) :]
        if hasattr(model.config, "num_experts_per_tok"):
            model.set_experts_implementation("eager")  # the other one has no fp64
        exact = [model.double()(torch.tensor([tokens])).logits[0] for tokens in ids]
    theirs = [torch.tensor(logits, dtype=torch.float64) for logits in facts["logits"]]
    assert largest(theirs, exact) <= 2 * largest(ours, exact), case
    assert facts["generated"] == generated.tolist(), case


def largest(logits: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return (torch.cat(logits) - torch.cat(exact)).abs().max().item()  # NaN where one is
