"""A run small enough to be trained many times in one test: awkward sizes, so that partitions cut through rows."""

from __future__ import annotations

import torch

from sgtm.config.schema import Config
from sgtm.model.transformer import Transformer
from sgtm_kernels.plan import MaskPlan, merge_label_runs

UNLABELED, RETAIN, FORGET = 0, 1, 2
SEQUENCES, MICRO_BATCH, CONTEXT, VOCAB = 8, 2, 6, 37
STAGES = [
    (stage, precision, offload)
    for stage in (0, 1, 2, 3)
    for precision in ("fp32", "bf16")
    for offload in (False, True)
    if stage or not offload
]
"""ZeRO stage, precision, and whether the optimizer is offloaded: all that go together."""


def tiny_config(stage: int = 1, precision: str = "fp32", **sections: dict) -> Config:
    """`sections` replace keys of theirs, e.g. `optimizer={"lr": 1.0}`."""
    values = {
        "model": {
            "layers": 2,
            "hidden_size": 9,
            "heads": 3,
            "intermediate_size": 11,
            "vocab_size": VOCAB,
            "context": CONTEXT,
            "window": 4,
            "init_std": 0.2,
        },
        "masking": {"domains": ["es"], "forget_heads": 1, "forget_neurons": 3, "joint": "masked"},
        "optimizer": {"lr": 1e-2, "warmup_steps": 0},
        "train": {
            "steps": 8,
            "tokens_per_step": SEQUENCES * CONTEXT,
            "micro_batch": MICRO_BATCH,
            "precision": precision,
        },
        "distributed": {"zero_stage": stage, "timeout_minutes": 1},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Config.model_validate(values)


def tiny_model(config: Config, seed: int = 0) -> Transformer:
    """Every parameter random, biases and norms too, so that no two elements are alike."""
    torch.manual_seed(seed)
    model = Transformer(config.model, config.partition, "torch")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if "norm" in name else 0.05))
    return model


def tiny_step(config: Config, step: int, labels: tuple[int, ...], rank: int, world_size: int) -> list[tuple]:
    """This rank's micro-batches of a global step, as the arguments of the model: labels are of the 8 sequences.

    The global step is the same for any number of ranks.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(VOCAB, (SEQUENCES, CONTEXT), generator=generator)
    batches = []
    for start in range(rank * MICRO_BATCH, SEQUENCES, MICRO_BATCH * world_size):
        rows = slice(start, start + MICRO_BATCH)
        runs = merge_label_runs(list(labels[rows]), [CONTEXT] * MICRO_BATCH)
        plan = MaskPlan(config.tables, runs, MICRO_BATCH, CONTEXT)
        batches.append((ids[rows], ids[rows].roll(-1, dims=1), plan, 1 / (SEQUENCES * CONTEXT)))
    return batches


MIXED = (FORGET, FORGET, UNLABELED, UNLABELED, FORGET, UNLABELED, RETAIN, RETAIN)
