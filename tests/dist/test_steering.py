"""Steering in every ZeRO stage on two ranks: what one process computes, and with strength 0 not a bit of it.

ZeRO-3 here keeps nothing whole that it could shard.
"""

from __future__ import annotations

import pytest
import torch
from engines import shard_everything
from families import SPACE, model_of, plan_of, random_step, run_config, state_of
from ranks import run_ranks

from sgtm.model.output_norms import OutputNorms
from sgtm.model.steering import Steering

VECTOR, STEPS = torch.linspace(-1.0, 2.0, 16), 3
CASES = [(stage, mixing) for stage in range(4) for mixing in ("token", "micro")]


def train(stage: int, mixing: str, strength: float | None) -> tuple[list[float], dict, dict]:
    """Losses of the steps over all ranks, weights and moments, and the norms of the first step."""
    from sgtm.distributed.engine import Engine
    from sgtm.distributed.process_group import init_distributed
    from sgtm.training.step import StepTotals, train_step

    config = run_config(stage, "gpt_neo", "torch", mixing, strategy="none")
    shard_everything()
    init_distributed(config.distributed, config.kernels)
    model = model_of("gpt_neo", activation_checkpointing=stage == 2)
    if strength is not None:
        model.steering = Steering(VECTOR, 0, strength, SPACE.group_of("bio"))
    engine = Engine(model, config)
    totals, losses, norms = StepTotals(len(config.space.labels), engine.device), [], OutputNorms(config.tables)
    for step in range(STEPS):
        mine = random_step(mixing, step)[engine.rank :: engine.world_size]
        train_step(engine, mine, config.tables, 1e-2, totals, norms=None if step else norms)
        losses.append(float(engine.all_reduce_sum(torch.stack(engine.losses).sum())))
    return losses, state_of(engine), norms.take(engine.all_reduce_sum)


def every_case(stages: tuple[int, ...] = (0, 1, 2, 3)) -> dict:
    """Losses and norms by case and strength; raises where strength 0 has changed a bit, or 2 none."""
    results = {}
    for stage, mixing in CASES:
        if stage not in stages:
            continue
        plain, zero, steered = (train(stage, mixing, strength) for strength in (None, 0.0, 2.0))
        assert plain[0] == zero[0] != steered[0], (stage, mixing)
        assert all(torch.equal(plain[1][key], zero[1][key]) for key in plain[1]), (stage, mixing)
        results[stage, mixing] = steered[0], steered[2]
    return results


def in_one_process(mixing: str) -> list[float]:
    """Losses of the micro-batches of the first step, without an engine."""
    config, model = run_config(1, "gpt_neo", "torch", mixing, strategy="none"), model_of("gpt_neo")
    model.steering = Steering(VECTOR, 0, 2.0, SPACE.group_of("bio"))
    losses = []
    for batch in random_step(mixing):
        loss, _ = model(batch.input_ids, batch.targets, plan_of(batch, config.tables), 1.0 / batch.step_targets)
        losses.append(float(loss.detach()))
    return losses


def test_two_ranks_compute_what_one_does_in_every_stage():
    two, (one,) = run_ranks(every_case, 2), run_ranks(every_case, 1, (1,))
    assert two[0] == two[1]
    for (stage, mixing), (losses, norms) in two[0].items():
        expected, expected_norms = one[1, mixing]
        assert losses == pytest.approx(expected, rel=1e-5), (stage, mixing)
        assert losses[0] == pytest.approx(sum(in_one_process(mixing)), rel=1e-5), (stage, mixing)
        assert norms.keys() == expected_norms.keys()
        for label, parts in norms.items():
            assert parts["projection"] == pytest.approx(expected_norms[label]["projection"], rel=1e-4)
