"""`grad_clip_scope: owner`: gradients are clipped, and skipped, for each owner by itself, in every ZeRO stage.

The retain group and all joint parameters are one owner, each domain's group is one.
"""

from __future__ import annotations

import math

import pytest
import torch
from families import (
    BIO,
    CODE,
    RETAIN,
    SPACE,
    UNLABELED,
    by_key,
    gradients,
    model_of,
    random_step,
    relabelled,
    run_config,
    state_of,
)
from ranks import run_ranks

from sgtm.model.rows import live_keys, owner_of

LIMIT = 0.05
CASES = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]


def config_of(stage: int, precision: str):
    config = run_config(stage, "gpt_neo", "torch", "sequence", strategy="sgtm+strict", precision=precision)
    optimizer = config.optimizer.model_copy(update={"grad_clip": LIMIT, "grad_clip_scope": "owner"})
    return config.model_copy(update={"optimizer": optimizer})


def random_batches():
    """Without tokens that read every group and train retain: with them a domain's NaN is everybody's."""
    return relabelled(random_step("sequence", seed=1), {UNLABELED: RETAIN})


def step(engine, config) -> None:
    """One global step; the second rank, if there is one, has the second micro-batch."""
    batches = random_batches()
    mine = batches if engine.world_size == 1 else batches[engine.rank : engine.rank + 1]
    for batch in mine:
        ids, targets, plan = batch.on(engine.device, config.tables)
        engine.backward(engine(ids, targets, plan, 1 / batch.step_targets)[0])
    engine.step(live_keys(config.tables, batches[0].step_labels), 1e-2, measure=True)


def expected_norms(model, config) -> list[float]:
    squares = [0.0] * len(SPACE.groups)
    for (key, _, _), piece in by_key(model, gradients(model, random_batches(), config.tables)).items():
        squares[owner_of(key, SPACE.groups)] += float(piece.double().square().sum())
    return [math.sqrt(square) for square in squares]


def check(stage: int, precision: str) -> None:
    from sgtm.distributed.engine import Engine
    from sgtm.distributed.process_group import init_distributed

    config, where = config_of(stage, precision), f"ZeRO {stage} {precision}"
    init_distributed(config.distributed, config.kernels)
    expected = expected_norms(model_of("gpt_neo"), config)
    assert len({round(norm / LIMIT) for norm in expected}) == 3 and min(expected) > LIMIT, (
        "all clipped, by other factors"
    )
    engine = Engine(model_of("gpt_neo"), config)
    step(engine, config)
    bound = 1e-5 if precision == "fp32" else 2e-2
    assert engine._norm.norms == pytest.approx(expected, rel=bound), where
    assert engine.optimizer.factors == pytest.approx([LIMIT / (norm + 1e-6) for norm in expected], rel=bound), where
    for (key, part), moment in state_of(engine).items():  # of the first step: 0.05 (1 - beta2) times the gradient
        if part[0] == "exp_avg":
            grad = moment / (1 - config.optimizer.betas[0])
            assert float(grad.norm()) <= 1.001 * LIMIT, f"{where}: {key}"
    squares = [0.0] * len(SPACE.groups)
    state = engine.all_reduce_sum(torch.tensor([_squares(engine, owner, config) for owner in range(3)]).double())
    squares = (state / (engine.world_size if engine._plain else 1)).sqrt().tolist()
    assert squares == pytest.approx([LIMIT * (1 - config.optimizer.betas[0])] * 3, rel=1e-4), where

    poison(engine, "code")
    before, counts = state_of(engine), dict(engine.optimizer.steps)
    step(engine, config)
    assert not engine.finite and engine.skipped == ("code",), where
    infinite = {key for key, norm in engine.key_norms().items() if math.isinf(norm)}
    assert infinite and all(key.endswith(".code") for key in infinite), where
    after = state_of(engine)
    for (key, part), old in before.items():
        owner = owner_of(key, SPACE.groups)
        new = after[key, part]
        same = torch.equal(old.nan_to_num(7), new.nan_to_num(7))
        if owner == 2:
            assert same, f"{where}: {key} {part} of a skipped owner"
        elif part[0] == "exp_avg" and bool((old != 0).any()):
            assert not same and bool(new.isfinite().all()), f"{where}: {key} {part}"
    moved = {key for key in counts if engine.optimizer.steps[key] > counts[key]}
    assert moved == {key for key in counts if owner_of(key, SPACE.groups) != 2}, where


def _squares(engine, owner: int, config) -> float:
    keys = [key for key in state_of(engine) if key[1][0] == "exp_avg" and owner_of(key[0], SPACE.groups) == owner]
    state = state_of(engine)
    return sum(float(state[key].double().square().sum()) for key in keys)


@torch.no_grad()
def poison(engine, group: str) -> None:
    """Huge rows of a domain, in what the model computes with: its tokens overflow, no others read them."""
    gathered = getattr(engine._deepspeed.optimizer, "persistent_parameters", [])  # small ones, after a ZeRO 3 step
    if gathered:
        gathered[0].partition(gathered)
    rows = engine.module.parameter_rows()
    numels = {name: getattr(p, "ds_numel", p.numel()) for name, p in engine.module.named_parameters()}
    for name, parameter in engine.module.named_parameters():
        for start, end, key in rows[name].segments(numels[name] // rows[name].bounds[-1]):
            if not key.endswith(f".{group}"):
                continue
            if not hasattr(parameter, "ds_tensor"):
                parameter.view(-1)[start:end] = 1e30
                continue
            for piece in engine.fragments:
                if piece.name == name:
                    low, high = max(start, piece.start), min(end, piece.end)
                    parameter.ds_tensor.view(-1)[max(low - piece.start, 0) : max(high - piece.start, 0)] = 1e30


def all_cases() -> None:
    for case in CASES:
        check(*case)


@pytest.mark.parametrize("world_size", [1, 2])
def test_owners_clip_and_skip_by_themselves(world_size):
    run_ranks(all_cases, world_size)


def test_every_key_has_its_owner():
    assert [owner_of(key, SPACE.groups) for key in ("mlp_in.retain", "norm", "always", "attn_out.bio")] == [0, 0, 0, 1]
    assert (BIO, CODE, RETAIN) == (2, 3, 1)
