"""What an exported model computes, held against the run's model without the removed groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from sgtm.config import Config
from sgtm.data.store import Corpus
from sgtm.evaluation.losses import evaluate
from sgtm.hf.config import model_config_from_hf
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
    theirs = _loaded(folder)
    logits = theirs.eval()(ids).logits
    share = float((logits - expected).abs().max() / expected.abs().max())
    limit = LOGITS[record["dtype"]]
    if not share <= limit:
        return [
            f"{folder}: its logits differ from the ablated model's by {share:.2g} of the largest, more than {limit:g}"
        ]
    return []


def loss_problems(folder: Path, record: dict, config: Config, corpus: Corpus) -> list[str]:
    """Of the held-out text that the card's losses are of: those of the folder's model."""
    losses = record["losses"]
    model = _as_ours(folder, config)
    if config.train.precision == "bf16":
        model = model.bfloat16()
    plain = config.model_copy(
        update={
            "masking": config.masking.model_copy(update={"strategy": "none", "overrides": {}}),
            "train": config.train.model_copy(update={"init_from": None}),
        }
    )
    sample = {"split": losses["split"], "sequences": losses["sequences"]}
    measured = evaluate(model, corpus, plain, **sample, device=torch.device("cpu")).losses[FULL]
    limit = LOSSES["bf16" if "bf16" in (config.train.precision, record["dtype"]) else "fp32"]
    problems = []
    for row in losses["rows"]:
        loss, stated = measured.get(row["category"]), row["this"]
        if stated is not None and (loss is None or not abs(loss - stated) <= limit):
            shown = "not measured" if loss is None else f"{loss:.4f}"
            problems.append(f"{folder}: loss on {row['category']} is {shown}, the card has {stated:.4f}")
    return problems


def _loaded(folder: Path):
    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, trust_remote_code=False
    )


def _as_ours(folder: Path, config: Config) -> Transformer:
    """The folder's model as our transformer of a single group, which rounds as the run's does."""
    theirs = _loaded(folder)
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
