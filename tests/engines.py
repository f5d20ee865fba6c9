"""Tiny engines on the ranks of a test: made, trained, saved, and looked at as a whole."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import FORGET, MIXED, tiny_model, tiny_step

from sgtm.model.rows import live_keys


def train(engine, steps) -> list[float]:
    losses = []
    for step in steps:
        labels = (FORGET,) * 8 if step % 2 else MIXED
        total = torch.zeros(())
        for batch in tiny_step(engine.config, step, labels, engine.rank, engine.world_size):
            loss, _ = engine(*batch)
            total += loss.detach()
            engine.backward(loss)
        engine.step(live_keys(engine.config.tables, labels), 1e-2)
        losses.append(float(total))
    return losses


def new_engine(config, seed: int = 0):
    from sgtm.distributed.engine import Engine
    from sgtm.distributed.process_group import init_distributed

    init_distributed(config.distributed, config.kernels)
    return Engine(tiny_model(config, seed), config)


def shard_everything() -> None:
    """Engines of this process keep nothing whole under ZeRO-3 that they could shard."""
    from sgtm.distributed import engine

    make = engine.deepspeed_config

    def settings(*args) -> dict:
        config = make(*args)
        if config["zero_optimization"]["stage"] == 3:
            limits = "param_persistence_threshold", "max_reuse_distance", "prefetch_bucket_size"
            config["zero_optimization"] |= {f"stage3_{limit}": 0 for limit in limits}
        return config

    engine.deepspeed_config = settings


def save(engine, run: Path, step: int, config, progress: object = None) -> Path:
    """A whole checkpoint, before anything else happens."""
    from sgtm.run.saving import CheckpointWriter

    writer = CheckpointWriter(engine, run, config)
    assert writer.start(step, progress) == []
    return writer.finish().path


def assemble(engine, tensor_of) -> dict[str, torch.Tensor]:
    """Whole parameters, flattened, from all ranks' fragments; `tensor_of(t)` is what to read of an optimizer tensor."""
    mine = [(f.name, f.start, f.end, tensor_of(f)[f.offset : f.offset + f.end - f.start]) for f in engine.fragments]
    everyone = [None] * engine.world_size
    torch.distributed.all_gather_object(everyone, mine)
    whole = {}
    for name, start, end, values in (piece for pieces in everyone for piece in pieces):
        whole.setdefault(name, torch.full((max(p[2] for ps in everyone for p in ps if p[0] == name),), torch.nan))
        whole[name][start:end] = values
    return whole
