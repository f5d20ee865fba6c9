"""Runs to export: a config and one checkpoint of random weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import torch

from sgtm.config import load_config
from sgtm.data.tokenizer import EOS, train_bpe
from sgtm.model.transformer import Transformer
from sgtm.run.checkpoint import write_manifest

GPT_NEO = """\
name: small
model: {layers: 2, hidden_size: 32, heads: 4, intermediate_size: 24, vocab_size: 257, context: 16, window: 4}
masking: {domains: [es, fr], forget_heads: {es: [0], fr: [2]}, forget_neurons: {es: [1, 8, 20], fr: 4}}
train: {tokens_per_step: 64, precision: fp32}
"""
LLAMA = GPT_NEO.replace("window: 4", "family: llama, kv_heads: 4, tie_embeddings: false")
MIXTRAL = LLAMA.replace("family: llama", "family: mixtral, experts: 6, experts_per_token: 2").replace(
    "forget_neurons: {es: [1, 8, 20], fr: 4}", "forget_experts: {es: [0, 4], fr: 1}"
)
SHARED_EXPERTS = MIXTRAL.replace("experts: 6", "experts: 6, shared_experts: 2")
SOME_LAYERS = LLAMA.replace("masking: {", "masking: {masked_layers: [1], ")


def byte_corpus() -> SimpleNamespace:
    """What an export reads of a corpus: a tokenizer of 257 tokens."""
    tokenizer = train_bpe([], 257)
    end = tokenizer.token_to_id(EOS)
    return SimpleNamespace(tokenizer=tokenizer, eos_id=end, fingerprint="of the run", path="data", token_names={})


def make_run(run: Path, text: str, corpus: str = "of the run", seed: int = 0) -> Transformer:
    """A run directory whose one checkpoint holds the returned model's random weights, no two of them alike.

    corpus  fingerprint of the data
    seed    of the weights
    """
    run.mkdir()
    (run / "config.yaml").write_text(text)
    config = load_config(str(run / "config.yaml"))
    torch.manual_seed(seed)
    model = Transformer(config.model, config.partition, "reference")
    total = sum(parameter.numel() for parameter in model.parameters())
    distinct = (torch.randperm(total) + 0.5).div_(total).sub_(0.5)
    for parameter in model.parameters():
        parameter.data.copy_(distinct[: parameter.numel()].view_as(parameter))
        distinct = distinct[parameter.numel() :]
    checkpoint = run / "checkpoints" / "step_00000007"
    checkpoint.mkdir(parents=True)
    weights = checkpoint / "mp_rank_00_model_states.pt"
    rest = {"buffer_names": [], "param_shapes": None, "optimizer": {"state": {}}, "sgtm": {}}
    torch.save({"module": model.state_dict(), **rest}, weights)
    entry = {"bytes": weights.stat().st_size, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    manifest = {"step": 7, "ranks": 1, "corpus": corpus, "config": config.model_dump(mode="json")}
    manifest["files"] = {weights.name: entry}
    write_manifest(checkpoint, manifest)
    (run / "checkpoints" / "latest").write_text(checkpoint.name)
    return model
