"""From a run to an ordinary Hugging Face folder, whole, with domains removed, or with domains at a part of their
strength.

The folder loads with `AutoModelForCausalLM.from_pretrained` and needs none of our code. It appears under its name only
when it is complete. Weights are read, converted and written one after the other, so that no more than a shard is held
in memory beside the matrix at hand. `tests/unit/test_export.py` looks into the written file for what must not be there.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sgtm.config import Config
from sgtm.data.open import open_corpus
from sgtm.data.plain_text import plain_text, unknown_token
from sgtm.files import sha256_of
from sgtm.hf.card import RECORD, card, record_of
from sgtm.hf.experts import folder_state
from sgtm.hf.folder import check_empty, filled
from sgtm.hf.names import HEAD
from sgtm.hf.shards import write_shards
from sgtm.hf.weights import Conversion
from sgtm.run.adapters import adapted_domain, weights_of
from sgtm.run.checkpoint import check_same_corpus, open_run, read_manifest
from sgtm.words import listed

CONFIG, CARD = "config.json", "README.md"
Dtype = Literal["fp32", "bf16"]
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARD = 2 * 10**9
"""Bytes of a file of weights."""

log = logging.getLogger(__name__)


class ControlTokens(NamedTuple):
    """Ids of a tokenizer's control tokens; pad_id: None where it has none."""

    eos_id: int
    pad_id: int | None

    def enter(self, hf_config: PretrainedConfig) -> None:
        """Name them in the config of a model."""
        hf_config.eos_token_id, hf_config.pad_token_id = self


def export_run(
    run: str | Path,
    remove: Sequence[str],
    out: str | Path,
    data: str | None = None,
    *,
    strengths: Mapping[str, float] | None = None,
    prune: bool = True,
    dtype: Dtype = "fp32",
    shard: int = SHARD,
) -> Path:
    """Write the newest checkpoint of a run as a Hugging Face folder without the groups of the domains in `remove`; of
    an adapted run with the adapters of its domain, or without them, which is an export of its base.

    The folder holds config.json, generation_config.json, the weights as safetensors with an index where there are
    several, the tokenizer of the prepared corpus, a model card, and sgtm_export.json: what was removed and how, from
    which checkpoint (by hash), the losses that were measured there, the partition, and size and SHA-256 of every other
    file.

    out        a new folder, or an empty one, through links too
    data       folder of the prepared corpus; None: `data.path` of the run
    strengths  by domain, above 0 and up to 1: what its group's outputs are multiplied by. Such an export is marked as
               not safe: it holds the group, and more of its outputs is a multiplication away
    prune      False: removed heads and neurons stay, as zeros, in a model of the shape of the full one
    dtype      of the weights; `bf16` rounds them
    shard      most bytes in a file of weights; a larger tensor has a file to itself

    Returns `out`, and prints on stderr which step that is, and why the architecture is not the run's where it is not.

    Raises ValueError where there is no run or checkpoint, the checkpoint is damaged, a domain is unknown or the run was
    trained without masks, the model has no Hugging Face form, `data.path` holds another corpus than that of the run, or
    `out` is not empty; then nothing is left behind.
    """
    run, strengths = Path(run), dict(strengths or {})
    name = re.sub(r"[^\w.-]", "-", check_empty(out).name)[:100]  # as a title, which an audit cannot foresee
    config, checkpoint = open_run(run, data)
    adapted = adapted_domain(checkpoint)
    _check_domains(run, config, adapted, remove, strengths)
    removed = [] if adapted else sorted(set(remove))
    conversion = Conversion(config.model, config.partition, removed, strengths, prune)
    with filled(out, CONFIG) as partial:
        conversion.config.dtype = DTYPES[dtype]
        control = save_tokenizer(run, config, read_manifest(checkpoint), partial)
        if control is not None:
            control.enter(conversion.config)
        weights = conversion.tensors(weights_of(checkpoint, adapters=not remove))
        write_shards(_checked(weights, conversion.config), partial, DTYPES[dtype], shard)
        save_config(conversion.config, partial)
        record = record_of(run, config, checkpoint, conversion.config, sorted(set(remove)), strengths, prune)
        record |= {"tokenizer": control is not None, "dtype": dtype}
        (partial / CARD).write_text(card(record, name), encoding="utf-8")
        record["files"] = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in sorted(partial.iterdir())
        }
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _print(record, config)
    return Path(out)


def _check_domains(
    run: Path, config: Config, adapted: str | None, remove: Sequence[str], strengths: Mapping[str, float]
) -> None:
    """Raises ValueError where nothing of the run holds these domains alone."""
    named = [*remove, *strengths]
    if adapted and strengths:
        raise ValueError(
            f"{run} has adapters of {adapted}, which are merged or left out, not reduced; leave out strengths"
        )
    if adapted and (others := sorted(set(remove) - {adapted})):
        raise ValueError(
            f"{run} has adapters of {adapted}, which --remove {adapted} leaves out; nothing of it holds "
            f"{listed(others)} alone: export the run that it was made from to remove that"
        )
    if named and not (adapted or config.removes_groups):
        raise ValueError(
            f"{run} was trained without masks: no group of it holds {', '.join(named)}, and nothing can be removed; "
            f"leave out --remove, or export a run that was trained with masks"
        )


def _checked(tensors: Iterator[tuple[str, Tensor]], hf_config: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors, each of the shape that Hugging Face's model has under its name, and none missing at the end."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    missing = {name: tensor.shape for name, tensor in folder_state(model.state_dict(), hf_config.model_type).items()}
    if hf_config.tie_word_embeddings:
        del missing[HEAD]
    for name, tensor in tensors:
        shape = missing.pop(name)
        assert tensor.shape == shape, f"{name}: {tuple(tensor.shape)} in place of {tuple(shape)}"
        yield name, tensor
    assert not missing, f"no tensors for {sorted(missing)}"


def save_config(hf_config: PretrainedConfig, folder: Path) -> None:
    """config.json and generation_config.json."""
    hf_config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[hf_config.model_type]]
    hf_config.save_pretrained(folder)
    GenerationConfig.from_model_config(hf_config).save_pretrained(folder)
    written = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    written["torch_dtype"] = written["dtype"]  # transformers 4 and other programs read their own names of these
    if rope := getattr(hf_config, "rope_parameters", None):  # and without that take a base of 10,000
        written["rope_theta"] = rope["rope_theta"]
    (folder / CONFIG).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def save_tokenizer(run: Path, config: Config, manifest: dict, folder: Path) -> ControlTokens | None:
    """Write the corpus's tokenizer, which encodes as `prepare` did.

    manifest  of the checkpoint, with the fingerprint of the run's corpus: with the tokenizer of another one the model
              would write gibberish. Raises ValueError for another one.

    Text stays text, as in training: no BOS in front, no EOS behind, and the strings of control tokens are spelled out.
    A BOS is not named, because training has seen none.

    Weights outlive corpora, so a corpus that is gone costs the export its tokenizer and a warning, no more: None.
    """
    try:
        corpus = open_corpus(config, "sizes", write=False)
        tokenizer, names = corpus.tokenizer, corpus.token_names
    except (ValueError, OSError) as error:
        log.warning("exported without a tokenizer: %s", error)
        return None
    otherwise = "give its folder with --data.path, or move this one away to export without a tokenizer"
    check_same_corpus(run, manifest, corpus.path, corpus.fingerprint, otherwise)
    end = tokenizer.id_to_token(corpus.eos_id)
    assert end is not None  # the corpus took the id from this tokenizer
    tokenizer = plain_text(tokenizer, {end, *names.values()})
    special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    roles = {"eos_token": end, "pad_token": names.get("pad_token"), "unk_token": unknown_token(tokenizer)}
    named = {role: name for role, name in roles.items() if name is not None and name in special}
    pad_id = special[named["pad_token"]] if "pad_token" in named else None
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that transformers 4 and 5 both have
        "model_max_length": config.model.context,
        "model_input_names": ["input_ids", "attention_mask"],  # GPT-Neo would add embeddings of token types
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(named | settings, indent=2) + "\n", encoding="utf-8")
    return ControlTokens(corpus.eos_id, pad_id)


def _print(record: dict, config: Config) -> None:
    reduced = [f"{domain} at strength {strength:g}" for domain, strength in record["reduced"].items()]
    parts = ([f"without {listed(record['removed'])}"] if record["removed"] else []) + reduced
    print(
        f"exported: step {record['checkpoint']['step']} of {config.train.steps}, "
        f"{', '.join(parts) or 'nothing removed'}",
        file=sys.stderr,
    )
    if reduced:
        print(f"warning: not a safe model: it holds {listed(list(record['reduced']))}", file=sys.stderr)
    if record["removed"] and not record["losses"]:
        step = record["checkpoint"]["step"]
        print(f"the card has no losses: none were measured after step {step}; sgtm eval measures them", file=sys.stderr)
    if record["architecture_because"]:
        print(f"exported as {record['architecture']}: {record['architecture_because']}", file=sys.stderr)
