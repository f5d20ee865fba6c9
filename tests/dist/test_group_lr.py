"""`optimizer.group_lr`: a group trains at its own multiple of the learning rate, in every ZeRO stage.

Bit for bit: the rows of a group with a factor are those of a run whose learning rate is that multiple, all other rows
those of a run without factors; a factor of 1 is no factor.
"""

from __future__ import annotations

import pytest
import torch
from families import SPACE, model_of, random_step, run_config, state_of
from ranks import run_ranks

from sgtm.model.rows import live_keys, owner_of

LR = 1e-2
CASES = [
    (0, "fp32", False, "owner"),
    (0, "bf16", False, "global"),
    (1, "fp32", False, "global"),
    (2, "bf16", False, "owner"),
    (2, "fp32", True, "global"),
    (3, "fp32", False, "owner"),
    (3, "bf16", False, "global"),
]
"""ZeRO stage, precision, whether the optimizer is offloaded, and `grad_clip_scope`."""


def trained(stage: int, precision: str, offload: bool, scope: str, rates: dict[str, float], lr: float = LR) -> dict:
    """Weights and moments after one step."""
    from sgtm.distributed.engine import Engine
    from sgtm.distributed.process_group import init_distributed

    config = run_config(stage, "llama", "torch", "sequence", precision=precision, offload=offload, grad_clip=0.05)
    optimizer = config.optimizer.model_copy(update={"group_lr": rates, "grad_clip_scope": scope})
    config = config.model_copy(update={"optimizer": optimizer})
    init_distributed(config.distributed, config.kernels)
    engine = Engine(model_of("llama"), config)
    batches = random_step("sequence", seed=1)
    for batch in batches[engine.rank :: engine.world_size]:
        ids, targets, plan = batch.on(engine.device, config.tables)
        engine.backward(engine(ids, targets, plan, 1 / batch.step_targets)[0])
    engine.step(live_keys(config.tables, batches[0].step_labels), lr)
    return state_of(engine)


def check(stage: int, precision: str, offload: bool, scope: str) -> None:
    setting = (stage, precision, offload, scope)
    plain, slow, double = trained(*setting, {}), trained(*setting, {}, LR * 0.5), trained(*setting, {}, LR * 2)
    of_one = trained(*setting, {"bio": 1.0, "retain": 1.0})
    mixed = trained(*setting, {"bio": 0.5, "retain": 2.0})
    expected = (double, slow, plain)  # retain and joint; bio; code
    for piece, weights in plain.items():
        key, (what, _, _) = piece
        assert torch.equal(weights, of_one[piece]), f"{setting}: {piece} with factors of 1"
        owner = owner_of(key, SPACE.groups)
        assert torch.equal(mixed[piece], expected[owner][piece]), f"{setting}: {piece}"
        if what == "weight" and owner < 2 and weights.any():
            assert not torch.equal(mixed[piece], weights), f"{setting}: {piece} has the rate of the others"


def all_cases() -> None:
    for case in CASES:
        check(*case)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_group_trains_at_its_own_rate(world_size):
    run_ranks(all_cases, world_size)
