"""What an export says of itself: `sgtm_export.json`, and the model card that is made from it.

`sgtm_export.json` holds

run, recipe, method   name of the run, and what it was trained with
removed, reduced      domains without which the model is; domains that it has at a strength below 1, by strength
pruned                whether heads, neurons and experts of removed domains were to be cut out
how                   `physically removed` or `zeroed`, by what the removed domains own (heads, neurons, experts); `left
                      out` for adapters
independent_of        removed domains whose documents the weights do not depend on, to the bit
checkpoint            name, step, manifest_sha256 of its manifest, which has the hashes of its files
corpus                fingerprint of the data
losses                None where nothing was measured after that step, else `split`, `sequences` (of each
                      category; None: all), `by` (the command), and `rows`:
                      category, true_label, tokens, and nats per token with their standard errors over documents of the
                      full model (full, full_error) and of this one (this, this_error; None where it was not measured)
init_from             `train.init_from` of the run
architecture          `model_type` of the folder, and in architecture_because why it is not the run's family
unlearned, adapted    what was done to the run after its training; None where nothing was
tokenizer, dtype      whether the folder has a tokenizer; `fp32` or `bf16`
versions              of sgtm, torch and transformers
partition             which heads and neurons belong to whom
files                 bytes and sha256 of every other file of the folder
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from transformers import PretrainedConfig

from sgtm.config import Config
from sgtm.files import sha256_of
from sgtm.hf.config import why_architecture
from sgtm.masking.labels import FULL, removal_name
from sgtm.masking.partition import Partition
from sgtm.run.adapted import described_adapters, read_adapted
from sgtm.run.checkpoint import MANIFEST, read_manifest
from sgtm.run.measured import measured_at
from sgtm.run.unlearned import described, read_unlearned
from sgtm.words import listed

RECORD = "sgtm_export.json"


def record_of(
    run: Path,
    config: Config,
    checkpoint: Path,
    hf_config: PretrainedConfig,
    removed: list[str],
    strengths: Mapping[str, float],
    pruned: bool,
) -> dict:
    """`sgtm_export.json` but for what follows from the written files."""
    manifest = read_manifest(checkpoint)
    reduced = {domain: strength for domain, strength in sorted(strengths.items()) if strength != 1}
    adapted = read_adapted(run)
    return {
        "run": config.name,
        "recipe": config.recipe,
        "method": config.method,
        "removed": removed,
        "reduced": reduced,
        "independent_of": [domain for domain in removed if domain in manifest["independent_of"]],
        "init_from": config.train.init_from,
        "pruned": pruned,
        "how": _how(config, hf_config, removed, bool(adapted)),
        "architecture": hf_config.model_type,
        "architecture_because": why_architecture(config.model, hf_config),
        "checkpoint": {
            "name": checkpoint.name,
            "step": manifest["step"],
            "manifest_sha256": sha256_of(checkpoint / MANIFEST),
        },
        "corpus": manifest["corpus"],
        "losses": _losses(run, config, manifest["step"], removed, bool(reduced)),
        "unlearned": read_unlearned(run),
        "adapted": adapted,
        "partition": _described(config.partition),
        "versions": {name: version(name) for name in ("sgtm", "torch", "transformers")},
    }


def _how(config: Config, hf_config: PretrainedConfig, removed: list[str], adapted: bool) -> dict[str, str]:
    if adapted:
        return {"adapters": "left out"} if removed else {}
    groups = [config.partition.groups.index(domain) for domain in removed]
    physically = {"heads": hf_config.num_attention_heads < config.model.heads}
    if config.model.experts:
        physically["experts"] = hf_config.num_local_experts < config.model.experts
    else:
        physically["neurons"] = hf_config.intermediate_size < config.model.intermediate_size
    return {
        unit: "physically removed" if gone else "zeroed"
        for unit, gone in physically.items()
        if any(_owns(getattr(layer, unit), groups) for layer in config.partition.layers)
    }


def _owns(counts: tuple[int, ...], groups: list[int]) -> bool:
    """Whether one of these groups has something in a layer, of which `counts` has the number by group."""
    return any(counts[group] for group in groups if group < len(counts))  # a layer without groups has retain alone


def _losses(run: Path, config: Config, step: int, removed: list[str], reduced: bool) -> dict | None:
    measured = measured_at(run, step, config.train.eval_limit)
    if measured is None:
        return None
    this = removal_name(domain for domain in config.masking.domains if domain in removed)
    rows = []
    for category, full in measured["losses"][FULL].items():
        errors = {key: by_category.get(category) for key, by_category in measured["errors"].items()}
        rows.append(
            {
                "category": category,
                "true_label": measured["true_labels"].get(category),
                "tokens": measured["measured"].get(category, {}).get("tokens"),
                "full": full,
                "full_error": errors.get(FULL),
                "this": None if reduced else measured["losses"].get(this, {}).get(category),
                "this_error": None if reduced else errors.get(this),
            }
        )
    return {**{key: measured[key] for key in ("split", "sequences", "by")}, "rows": rows}


def _described(partition: Partition) -> dict:
    """The partition as JSON. Layers that are alike share an entry of `kinds`, named by position in `layers`."""
    distinct = list(dict.fromkeys(partition.layers))
    return {
        "groups": partition.groups,
        "layers": [distinct.index(layer) for layer in partition.layers],
        "kinds": [asdict(layer) for layer in distinct],
    }


def card(record: dict, name: str) -> str:
    """README.md of the folder `name`, from `sgtm_export.json` without the hashes of its files."""
    removed = ", ".join(f"`{domain}`" for domain in record["removed"])
    what = f"without its domains {removed}" if removed else "with all its domains"
    how = "; ".join(f"{unit} {done}" for unit, done in record["how"].items())
    paragraphs = [
        f"# {name}",
        _not_safe(record),
        f"Run `{record['run']}`, step {record['checkpoint']['step']:,}, pretrained with Selective GradienT Masking "
        f"({record['method']}), {what}{f' ({how})' if how else ''}. {_made(record)}"
        f"`{RECORD}` lists what belonged to whom.",
        f"It loads in transformers 4.57 and 5, weights in {record['dtype']}. {_architecture(record)}"
        f"{_tokenizer(record)}",
        _certificate(record),
        *_loss_table(record),
        "## Origin",
        _origin(record),
    ]
    front = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
    return front + "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def _not_safe(record: dict) -> str:
    reduced = [f"`{domain}` at strength {strength:g}" for domain, strength in record["reduced"].items()]
    return (
        f"**Not a safe model.** It has {listed(reduced)}: its weights are there, and the full ones a multiplication "
        f"away."
        if reduced
        else ""
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
    others = ", ".join(f"`{domain}`" for domain in record["removed"] if domain not in record["independent_of"])
    initial = ", the initial weights" if record["init_from"] else ""
    certified = (
        f"Certified: these weights are independent, to the bit, of what the documents labelled {domains} said; their "
        f"lengths, the tokenizer{initial} and the split may still depend on them."
    )
    not_certified = f"Not certified for {others}: these weights may have learned from documents with that label."
    return " ".join([certified] * bool(domains) + [not_certified] * bool(others))


def _loss_table(record: dict) -> list[str]:
    losses, step = record["losses"], record["checkpoint"]["step"]
    if losses is None:
        return ["## Losses", f"None were measured after step {step:,}; `sgtm eval` does."]
    lines = ["| category | label | tokens | full model | this model |", "|---|---|---|---|---|"]
    for row in losses["rows"]:
        tokens = "" if row["tokens"] is None else f"{row['tokens']:,}"
        cells = [_loss(row[key], row[f"{key}_error"]) for key in ("full", "this")]
        lines.append(f"| {row['category']} | {row['true_label'] or ''} | {tokens} | {cells[0]} | {cells[1]} |")
    about = (
        f"Held-out loss in nats per token, split `{losses['split']}`, by `{losses['by']}` after step {step:,}; "
        f"± standard error over documents."
    )
    return ["## Losses", about, "\n".join(lines)]


def _loss(loss: float | None, error: float | None) -> str:
    if loss is None:
        return "not measured"
    return f"{loss:.3f}" if error is None else f"{loss:.3f} ± {error:.3f}"


def _origin(record: dict) -> str:
    checkpoint = record["checkpoint"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return (
        f"- checkpoint: `{checkpoint['name']}`, SHA-256 of its manifest `{checkpoint['manifest_sha256']}`\n"
        f"- data: fingerprint `{record['corpus']}`\n"
        f"- recipe: {record['recipe'] or 'none'}\n"
        f"- written by {versions}; `{RECORD}` has the SHA-256 of every file"
    )
