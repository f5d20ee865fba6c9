"""From a run to an ordinary Hugging Face folder, whole or with domains removed.

The folder loads with `AutoModelForCausalLM.from_pretrained` and needs none of our code. It appears under its name only
when it is complete. `tests/unit/test_export.py` looks into the written file for what must not be there.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from sgtm.config import Config
from sgtm.data.open import open_corpus
from sgtm.distributed.storage import consolidate
from sgtm.files import sha256_of
from sgtm.masking.partition import Partition
from sgtm.model.hf import to_hf_state
from sgtm.train.checkpoint import MANIFEST, open_run, read_manifest

log = logging.getLogger(__name__)


def export_run(run: Path, remove: Sequence[str], out: Path) -> Path:
    """Write the newest checkpoint of a run as a Hugging Face folder without the groups of the domains in `remove`.

    The folder holds config.json, model.safetensors (fp32), the tokenizer of the prepared corpus, a model card, and
    sgtm_export.json: what was removed and how, from which checkpoint (by hash), and the partition.

    Returns `out`, and says on stderr which step that is.

    Raises ValueError where there is no run or checkpoint, the checkpoint is damaged, a domain is unknown, the model has
    no Hugging Face form, `data.path` holds other data than those of the run, or `out` is not empty; then nothing is
    left behind.
    """
    run, out = Path(run), Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; export to a new one")
    config, checkpoint = open_run(run)
    state, hf_config = to_hf_state(consolidate(checkpoint), config.model, config.partition, remove)

    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        tokenizer = _save_tokenizer(run, config, read_manifest(checkpoint)["corpus"], hf_config, partial)
        _save_model(state, hf_config, partial)
        record = _record(config, checkpoint, hf_config, sorted(set(remove)), tokenizer)
        (partial / "sgtm_export.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(_card(record, out.name), encoding="utf-8")
        os.replace(partial, out)
        print(f"exported: step {record['checkpoint']['step']} of {config.train.steps}", file=sys.stderr)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _save_model(state: dict[str, Tensor], hf_config: PretrainedConfig, folder: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # written for the owner alone, unlike everything else
        weights.chmod((folder / "config.json").stat().st_mode)


def _save_tokenizer(run: Path, config: Config, trained_on: str, hf_config: PretrainedConfig, folder: Path) -> bool:
    """Write the corpus's tokenizer and enter its end-of-text token into the model's config.

    trained_on  fingerprint of the run's corpus; another one's tokenizer would make the model speak gibberish

    Weights outlive corpora, so a corpus that is gone costs the export its tokenizer and a warning, no more.
    """
    try:
        corpus = open_corpus(config, "sizes", write=False)
        tokenizer = corpus.tokenizer
    except (ValueError, OSError) as error:
        log.warning("exported without a tokenizer: %s", error)
        return False
    if corpus.fingerprint != trained_on:
        raise ValueError(
            f"{run} was trained on other data than {corpus.path} holds now: prepared anew since? Its tokenizer may be "
            f"another one; put the data back, or move them away to export without a tokenizer"
        )
    hf_config.eos_token_id, end = corpus.eos_id, tokenizer.id_to_token(corpus.eos_id)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, model_max_length=config.model.context)
    wrapped.save_pretrained(folder)
    return True


def _record(config: Config, checkpoint: Path, hf_config: PretrainedConfig, removed: list[str], tokenizer: bool) -> dict:
    physically = {
        "heads": hf_config.num_attention_heads < config.model.heads,
        "neurons": hf_config.intermediate_size < config.model.intermediate_size,
    }
    manifest = read_manifest(checkpoint)
    return {
        "run": config.name,
        "removed": removed,
        "independent_of": [domain for domain in removed if domain in manifest["independent_of"]],
        "how": {unit: "physically removed" if gone else "zeroed" for unit, gone in physically.items()}
        if removed
        else {},
        "architecture": hf_config.model_type,
        "tokenizer": tokenizer,
        "checkpoint": {
            "name": checkpoint.name,
            "step": manifest["step"],
            "manifest_sha256": sha256_of(checkpoint / MANIFEST),
        },
        "strategy": config.masking.strategy,
        "partition": _described(config.partition),
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
    }


def _described(partition: Partition) -> dict:
    """The partition as JSON. Layers that are alike share an entry of `kinds`, named by position in `layers`."""
    kinds = list(dict.fromkeys(partition.layers))
    return {
        "groups": partition.groups,
        "layers": [kinds.index(layer) for layer in partition.layers],
        "kinds": [asdict(kind) for kind in kinds],
    }


def _card(record: dict, name: str) -> str:
    removed = ", ".join(f"`{domain}`" for domain in record["removed"])
    what = f"without its domains {removed}" if removed else "with all its domains"
    how = "; ".join(f"{unit} {done}" for unit, done in record["how"].items())
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {name}\n\n"
        f"Run `{record['run']}`, step {record['checkpoint']['step']}, pretrained with Selective GradienT Masking "
        f"(strategy `{record['strategy']}`), {what}{f' ({how})' if how else ''}. "
        f"`sgtm_export.json` says which heads and neurons belonged to whom.\n{_certificate(record)}"
    )


def _certificate(record: dict) -> str:
    domains = ", ".join(f"`{domain}`" for domain in record["independent_of"])
    return (
        f"\nCertified: these weights are independent, to the bit, of what the documents labelled {domains} said; their "
        f"lengths, the tokenizer and the split may still depend on them.\n"
        if domains
        else ""
    )
