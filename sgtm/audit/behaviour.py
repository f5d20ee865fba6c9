"""What an exported model computes, held against the run's model without the removed groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sgtm.config import Config
from sgtm.data.store import Corpus
from sgtm.evaluation.losses import evaluate
from sgtm.hf.card import RECORD
from sgtm.hf.config import model_config_from_hf
from sgtm.hf.transformers_model import load_in_transformers
from sgtm.hf.weights import from_hf_state
from sgtm.masking.labels import FULL, LabelSpace
from sgtm.masking.partition import build_partition
from sgtm.model.transformer import Transformer
from sgtm.run.evaluate import load_model
from sgtm_kernels.plan import MaskPlan

SEQUENCES, LENGTH, SEED = 4, 128, 20251205
LOGITS = {"fp32": 2e-5, "bf16": 3e-2}
"""Largest difference of logits, as a share of the largest logit, by the dtype of the export: sums are rounded in
another order, and bf16 weights as well."""
LOSSES = {"fp32": 1e-3, "bf16": 1e-2}
"""Nats, by the dtype that the losses are computed in (`train.precision`), which rounds the pruned model otherwise."""


@torch.no_grad()
def logit_problems(folder: Path, record: dict, config: Config, checkpoint: Path, removed: Sequence[str]) -> list[str]:
    """Of random tokens: transformers' model of the folder beside the run's with the groups of `removed` inactive."""
    length = min(LENGTH, config.model.context)
    ids = torch.randint(config.model.vocab_size, (SEQUENCES, length), generator=torch.Generator().manual_seed(SEED))
    model = load_model(config, checkpoint, adapters=not record["removed"]).cpu()
    model.steering = None
    tables = config.removal_tables(removed, record["reduced"])
    expected = model.logits(ids, MaskPlan.uniform(tables, 0, *ids.shape))
    del model
    logits = load_in_transformers(folder, attn_implementation="eager")(ids).logits
    share = float((logits - expected).abs().max() / expected.abs().max())
    limit = LOGITS[record["dtype"]]
    if not share <= limit:
        return [
            f"{folder}: its logits differ from the ablated model's by {share:.2g} of the largest, more than {limit:g}"
        ]
    return []


def loss_problems(folder: Path, record: dict, config: Config, checkpoint: Path, corpus: Corpus) -> list[str]:
    """Rows of the record's losses that the models contradict: the folder's, and the run's full one.

    Both are measured on the held-out text that the record names. The loss of this model may be left out where it has a
    domain at a strength, or where no evaluation of the run removes this set of domains.
    """
    losses = record["losses"]
    limit = LOSSES["bf16" if "bf16" in (config.train.precision, record["dtype"]) else "fp32"]
    right = _rows(_as_ours(folder, config), "this", config, corpus, losses)
    if not config.steered:  # the full model of a steered run is evaluated with its direction
        full = _rows(load_model(config, checkpoint), "full", config, corpus, losses)
        right = {category: row | full[category] for category, row in right.items()}
    removed = tuple(domain for domain in config.masking.domains if domain in record["removed"])
    optional = bool(record["reduced"]) or removed not in config.removals
    stated = {row["category"]: row for row in losses["rows"]}
    problems = [f"no row of {category}" for category in right if category not in stated]
    problems += [
        f"a row of {category}, of which the split has no token" for category in stated if category not in right
    ]
    for category in (category for category in stated if category in right):
        row = stated[category]
        left_out = ("this", "this_error") if optional and row["this"] is None else ()
        problems += [
            f"{category}: {key} is {row[key]}, measured {value}"
            for key, value in right[category].items()
            if key not in left_out and not _near(row[key], value, limit)
        ]
    return [f"{folder / RECORD}: losses: {problem}" for problem in problems]


def _rows(model: Transformer, name: str, config: Config, corpus: Corpus, losses: dict) -> dict[str, dict]:
    """By category, what the row of a record has of this model, whose loss is called `name` there."""
    model.steering = None
    if config.train.precision == "bf16":
        model = model.bfloat16()
    plain = config.model_copy(
        update={
            "masking": config.masking.model_copy(update={"strategy": "none", "overrides": {}}),
            "train": config.train.model_copy(update={"init_from": None}),
        }
    )
    cpu = torch.device("cpu")
    evaluation = evaluate(model, corpus, plain, split=losses["split"], sequences=losses["sequences"], device=cpu)
    return {
        category: {
            "true_label": evaluation.sample["true_labels"][category],
            "tokens": evaluation.sample["measured"][category]["tokens"],
            name: loss,
            f"{name}_error": evaluation.sample["errors"][FULL].get(category),
        }
        for category, loss in evaluation.losses[FULL].items()
    }


def _near(stated: Any, value: Any, limit: float) -> bool:
    if isinstance(value, float) and isinstance(stated, (int, float)):
        return abs(stated - value) <= limit
    return stated == value


def _as_ours(folder: Path, config: Config) -> Transformer:
    """The folder's model as our transformer of a single group, which rounds as the run's does."""
    theirs = load_in_transformers(folder, attn_implementation="eager")
    shape = model_config_from_hf(theirs.config)
    whole = build_partition(
        LabelSpace(()),
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.num_kv_heads,
        neurons=shape.intermediate_size,
        forget_heads=0,
        forget_neurons=0,
        experts=shape.experts,
        shared_experts=shape.shared_experts,
    )
    with torch.device("meta"):
        model = Transformer(shape, whole)
    model.load_state_dict(from_hf_state(theirs.state_dict(), theirs.config, whole), assign=True)
    return model
