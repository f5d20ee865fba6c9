"""From a run to an ordinary Hugging Face folder, whole or with domains removed.

The folder loads with `AutoModelForCausalLM.from_pretrained` and needs none of our code. It appears under its name only
when it is complete. `tests/unit/test_export.py` looks into the written file for what must not be there.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from sgtm.config import Config
from sgtm.data.open import open_corpus
from sgtm.data.plain_text import plain_text, unknown_token
from sgtm.files import sha256_of
from sgtm.hf.config import why_mistral
from sgtm.hf.weights import to_hf_state
from sgtm.masking.partition import Partition
from sgtm.run.adapted import described_adapters, read_adapted
from sgtm.run.adapters import adapted_domain, weights_of
from sgtm.run.checkpoint import MANIFEST, check_same_corpus, open_run, read_manifest
from sgtm.run.unlearned import described, read_unlearned
from sgtm.words import listed

CONFIG = "config.json"

log = logging.getLogger(__name__)


def export_run(run: str | Path, remove: Sequence[str], out: str | Path, data: str | None = None) -> Path:
    """Write the newest checkpoint of a run as a Hugging Face folder without the groups of the domains in `remove`; of
    an adapted run with the adapters of its domain, or without them, which is an export of its base.

    The folder holds config.json, model.safetensors (fp32), the tokenizer of the prepared corpus, a model card, and
    sgtm_export.json: what was removed and how, from which checkpoint (by hash), and the partition.

    out   a new folder, or an empty one, through links too
    data  folder of the prepared corpus; None: `data.path` of the run

    Returns `out`, and prints on stderr which step that is, and why the architecture is not the run's where it is not.

    Raises ValueError where there is no run or checkpoint, the checkpoint is damaged, a domain is unknown or the run was
    trained without masks, the model has no Hugging Face form, `data.path` holds another corpus than that of the run, or
    `out` is not empty; then nothing is left behind.
    """
    run, folder = Path(run), Path(out).resolve()
    _remove_leftovers(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; export to a new one")
    config, checkpoint = open_run(run, data)
    adapted = adapted_domain(checkpoint)
    if adapted and (others := sorted(set(remove) - {adapted})):
        raise ValueError(
            f"{run} has adapters of {adapted}, which --remove {adapted} leaves out; nothing of it holds "
            f"{listed(others)} alone: export the run that it was made from to remove that"
        )
    if remove and not (adapted or config.removes_groups):
        raise ValueError(
            f"{run} was trained without masks: no group of it holds {', '.join(remove)}, and nothing can be removed; "
            f"leave out --remove, or export a run that was trained with masks"
        )
    with _filled(folder) as partial:
        weights, groups = weights_of(checkpoint, adapters=not remove), () if adapted else remove
        state, hf_config = to_hf_state(weights, config.model, config.partition, groups)
        tokenizer = _save_tokenizer(run, config, read_manifest(checkpoint), hf_config, partial)
        _save_model(state, hf_config, partial)
        record = _record(config, checkpoint, hf_config, sorted(set(remove)), tokenizer) | {
            "unlearned": read_unlearned(run),
            "adapted": read_adapted(run),
        }
        if adapted and remove:
            record["how"] = {"adapters": "left out"}
        (partial / "sgtm_export.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(_card(record, folder.name), encoding="utf-8")
    without = f"without {listed(record['removed'])}" if remove else "nothing removed"
    print(f"exported: step {record['checkpoint']['step']} of {config.train.steps}, {without}", file=sys.stderr)
    if record["architecture_because"]:
        print(f"exported as {record['architecture']}: {record['architecture_because']}", file=sys.stderr)
    return Path(out)


def _partial(out: Path) -> Path:
    """What the names of folders that are not finished yet begin with; host and process follow."""
    return out / ".partial-" if out.exists() else out.with_name(f".{out.name}.partial-")


def _remove_leftovers(out: Path) -> None:
    """Of exports to `out` on this host whose processes were killed."""
    start = _partial(out)
    for folder in start.parent.glob(f"{glob.escape(start.name)}*"):
        host, _, process = folder.name.removeprefix(start.name).rpartition("-")
        if host == socket.gethostname() and process.isdigit() and not _runs(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


@contextmanager
def _filled(out: Path) -> Iterator[Path]:
    """A folder to write to, whose files are those of `out` when the block ends; after an error there are none.

    An empty folder that exists is filled and not replaced: it may be the working directory of a shell or the root of a
    file system. What makes it a model, config.json, comes last.
    """
    exists, moved = out.exists(), []
    partial = Path(f"{_partial(out)}{socket.gethostname()}-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if not exists:
            os.replace(partial, out)
            return
        for file in sorted(partial.iterdir(), key=lambda file: file.name == CONFIG):
            moved.append(out / file.name)
            os.replace(file, moved[-1])
        partial.rmdir()
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for file in moved:
            file.unlink(missing_ok=True)
        raise


def _save_model(state: dict[str, Tensor], hf_config: PretrainedConfig, folder: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # written for the owner alone, unlike everything else
        weights.chmod((folder / CONFIG).stat().st_mode)
    rope = getattr(hf_config, "rope_parameters", None)
    if rope:  # transformers 4 reads its own name of it, and without that takes 10,000
        written = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        written["rope_theta"] = rope["rope_theta"]
        (folder / CONFIG).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _save_tokenizer(run: Path, config: Config, manifest: dict, hf_config: PretrainedConfig, folder: Path) -> bool:
    """Write the corpus's tokenizer, which encodes as `prepare` did, and enter its tokens into the model's config.

    manifest  of the checkpoint, with the fingerprint of the run's corpus: with the tokenizer of another one the model
              would write gibberish. Raises ValueError for another one.

    Text stays text, as in training: no BOS in front, no EOS behind, and the strings of control tokens are spelled out.
    A BOS is not named, because training has seen none.

    Weights outlive corpora, so a corpus that is gone costs the export its tokenizer and a warning, no more.
    """
    try:
        corpus = open_corpus(config, "sizes", write=False)
        tokenizer, names = corpus.tokenizer, corpus.token_names
    except (ValueError, OSError) as error:
        log.warning("exported without a tokenizer: %s", error)
        return False
    otherwise = "give its folder with --data.path, or move this one away to export without a tokenizer"
    check_same_corpus(run, manifest, corpus.path, corpus.fingerprint, otherwise)
    end = tokenizer.id_to_token(corpus.eos_id)
    assert end is not None  # the corpus took the id from this tokenizer
    tokenizer = plain_text(tokenizer, {end, *names.values()})
    special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    roles = {"eos_token": end, "pad_token": names.get("pad_token"), "unk_token": unknown_token(tokenizer)}
    named = {role: name for role, name in roles.items() if name is not None and name in special}
    pad_id = special[named["pad_token"]] if "pad_token" in named else None
    hf_config.eos_token_id, hf_config.pad_token_id = corpus.eos_id, pad_id
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that transformers 4 and 5 both have
        "model_max_length": config.model.context,
        "model_input_names": ["input_ids", "attention_mask"],  # GPT-Neo would add embeddings of token types
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(named | settings, indent=2) + "\n", encoding="utf-8")
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
        "init_from": config.train.init_from,
        "how": {unit: "physically removed" if gone else "zeroed" for unit, gone in physically.items()}
        if removed
        else {},
        "architecture": hf_config.model_type,
        "architecture_because": why_mistral(config.model, hf_config),
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
    distinct = list(dict.fromkeys(partition.layers))
    return {
        "groups": partition.groups,
        "layers": [distinct.index(layer) for layer in partition.layers],
        "kinds": [asdict(layer) for layer in distinct],
    }


def _card(record: dict, name: str) -> str:
    removed = ", ".join(f"`{domain}`" for domain in record["removed"])
    what = f"without its domains {removed}" if removed else "with all its domains"
    how = "; ".join(f"{unit} {done}" for unit, done in record["how"].items())
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {name}\n\n"
        f"Run `{record['run']}`, step {record['checkpoint']['step']}, pretrained with Selective GradienT Masking "
        f"(strategy `{record['strategy']}`), {what}{f' ({how})' if how else ''}. {_made(record)}"
        f"`sgtm_export.json` lists which heads and neurons belonged to whom.\n\n"
        f"It loads in transformers 4.57 and 5. {_architecture(record)}{_tokenizer(record)}\n{_certificate(record)}"
    )


def _made(record: dict) -> str:
    unlearned = f"{described(record['unlearned'])} " if record["unlearned"] else ""
    return f"{unlearned}{described_adapters(record['adapted'])} " if record["adapted"] else unlearned


def _architecture(record: dict) -> str:
    because = record["architecture_because"]
    return f"Its architecture is `{record['architecture']}`: {because}. " if because else ""


def _tokenizer(record: dict) -> str:
    return (
        "The tokenizer encodes as in training: no BOS, and strings of control tokens in a text are spelled out; append "
        "`tokenizer.eos_token_id` to end a document."
        if record["tokenizer"]
        else "It has no tokenizer."
    )


def _certificate(record: dict) -> str:
    domains = ", ".join(f"`{domain}`" for domain in record["independent_of"])
    initial = ", the initial weights" if record["init_from"] else ""
    return (
        f"\nCertified: these weights are independent, to the bit, of what the documents labelled {domains} said; their "
        f"lengths, the tokenizer{initial} and the split may still depend on them.\n"
        if domains
        else ""
    )
