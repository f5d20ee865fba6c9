"""examples/gguf: llama.cpp's converter takes an export, and what it writes computes the same.

Runs where LLAMA_CPP names a checkout of llama.cpp whose packages are installed: no package index has the converter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from audited import evaluated_run
from transformers import AutoModelForCausalLM

from sgtm.hf.export import export_run

SCRIPT = Path(__file__).parents[2] / "examples" / "gguf" / "to_gguf.py"
LLAMA_CPP = os.environ.get("LLAMA_CPP")


@pytest.mark.skipif(not LLAMA_CPP, reason="LLAMA_CPP names no checkout of llama.cpp")
@pytest.mark.parametrize("prune", [True, False], ids=["pruned", "zeroed"])
def test_the_converted_model_computes_what_the_export_does(tmp_path, prune):
    run = evaluated_run(tmp_path, "llama")
    folder = export_run(run, ["es"] if not prune else [], tmp_path / "safe", prune=prune)
    command = [sys.executable, str(SCRIPT), str(LLAMA_CPP), str(folder), str(tmp_path / "safe.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="safe.gguf", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(257, (2, 16))
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


def test_the_script_names_the_tokenizer_that_prepare_trains():
    """llama.cpp's `gpt-2` is the byte-level one with GPT-2's pattern, which `train_bpe` makes."""
    from sgtm.data.tokenizer import train_bpe

    assert '"gpt-2"' in SCRIPT.read_text()
    state = train_bpe([], 257).to_str()
    assert '"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false' in state and '"use_regex":true' in state
