"""Exact freeze: what no token of a global step may update keeps every bit, in every ZeRO stage and precision.

With the optimizer on its device and in the host's memory.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import model_of, random_step, run_config, state_of
from ranks import run_ranks
from tiny import FORGET, MIXED, STAGES, tiny_config, tiny_model, tiny_step

from sgtm.data.batch import IGNORE
from sgtm.model.rows import live_keys
from sgtm_kernels.adamw import Update, adamw

PURE_FORGET = (FORGET,) * 8


def by_key(engine) -> dict[tuple[str, int], dict[str, torch.Tensor]]:
    """A copy of the weights (fp32), both moments and the last gradient, clipped, of every segment of this rank."""
    copies = {}
    for number, (tensor, table) in enumerate(engine.optimizer.tables.items()):
        state = engine.optimizer.state[tensor]
        parts = {"weight": tensor, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        if tensor.grad is not None:
            parts["grad"] = tensor.grad * engine.optimizer.factors[0]
        for start, end, key, decay in table:
            segment = {name: part.detach().reshape(-1)[start:end].clone() for name, part in parts.items()}
            copies[key, number, start] = segment | {"decay": decay}
    return copies


def module_weights(engine) -> dict[tuple[str, int], torch.Tensor]:
    """The weights the model computes with, by key: whole parameters, or the part of this rank under ZeRO-3."""
    rows, weights = engine.module.parameter_rows(), {}
    parameters = dict(engine.module.named_parameters())
    for name, parameter in parameters.items():
        partition = getattr(parameter, "ds_tensor", None)
        size = getattr(parameter, "ds_numel", parameter.numel())
        flat = torch.full((size,), torch.nan)
        if partition is None:
            flat[:] = parameter.detach().float().flatten()
        for piece in engine.fragments:
            if partition is not None and piece.name == name:
                flat[piece.start : piece.end] = partition.flatten()[: piece.end - piece.start].float()
        for start, end, key in rows[name].segments(size // rows[name].bounds[-1]):
            weights[key, name] = flat[start:end].clone()
    return weights


def train_one(engine, step: int, labels) -> dict:
    """One global step; returns the state by key just before the optimizer ran, with the gradients it was given."""
    config, before, inner = engine.config, {}, engine.optimizer.step

    def recording(*args):
        before.update(by_key(engine))
        return inner(*args)

    engine.optimizer.step = recording
    for batch in tiny_step(config, step, labels, engine.rank, engine.world_size):
        engine.backward(engine(*batch)[0])
    engine.step(live_keys(config.tables, labels), config.optimizer.lr)
    engine.optimizer.step = inner
    return before


def changed(old: dict, new: dict) -> tuple[set[str], set[str]]:
    """Keys of the segments whose weights and momentum kept every bit, and keys of the segments that moved."""
    moved = {key for key in old if any(not torch.equal(old[key][p], new[key][p]) for p in ("weight", "exp_avg"))}
    return {key[0] for key in old.keys() - moved}, {key[0] for key in moved}


def check_freeze(stage: int, precision: str, masked_update: str, offload: bool = False) -> None:
    from sgtm.distributed.engine import Engine
    from sgtm.distributed.process_group import init_distributed

    case = f"ZeRO {stage} {precision} {masked_update}{' offloaded' * offload}"
    sections = {"optimizer": {"masked_update": masked_update}, "distributed": {"offload_optimizer": offload}}
    config = tiny_config(stage, precision, **sections)
    init_distributed(config.distributed, config.kernels)
    engine = Engine(tiny_model(config), config)
    live = live_keys(config.tables, PURE_FORGET) & engine.optimizer.steps.keys()
    frozen = engine.optimizer.steps.keys() - live
    assert {"attn_in.retain", "mlp_out.retain", "embedding+head", "norm", "mlp_out_bias"} <= frozen
    assert {"attn_in.es", "mlp_out.es", "final_norm"} <= live

    train_one(engine, 0, MIXED)
    old, old_module = by_key(engine), module_weights(engine)
    train_one(engine, 1, PURE_FORGET)
    new, new_module = by_key(engine), module_weights(engine)
    stayed, moved = changed(old, new)
    everyone = [None] * engine.world_size
    torch.distributed.all_gather_object(everyone, moved)
    if masked_update == "exact":
        assert not stayed & live and not moved & frozen, f"{case}: {stayed & live} stayed, {moved & frozen} moved"
        assert set().union(*everyone) == live, f"{case}: only {everyone} moved"
        for key in (key for key in old if key[0] in frozen):
            same = [torch.equal(old[key][part], new[key][part]) for part in ("weight", "exp_avg", "exp_avg_sq")]
            assert all(same), f"{case}: {key} {same}"
        for key in (key for key in old_module if key[0] in frozen):
            assert torch.equal(old_module[key].nan_to_num(), new_module[key].nan_to_num()), f"{case}: module {key}"
    else:
        assert set().union(*everyone) == live | frozen, f"{case}: momentum and decay move everything"
    steps = engine.optimizer.steps
    assert steps == {key: 2 if key in live or masked_update == "zero_grad" else 1 for key in steps}, case

    before = train_one(engine, 2, MIXED)  # thawed: the update a key gets is its own second (or third)
    for key, now in by_key(engine).items():
        was = before[key]
        decay = config.optimizer.weight_decay if was["decay"] else 0.0
        tensors = [was[p].clone() for p in ("weight", "grad", "exp_avg", "exp_avg_sq")]
        adamw([Update(*tensors, steps[key[0]], decay)], config.optimizer.lr, (0.9, 0.95), 1e-8, "reference")
        assert torch.allclose(tensors[0], now["weight"], rtol=1e-5, atol=1e-7), f"{case}: {key} after the thaw"

    still = by_key(engine)
    for batch in tiny_step(config, 3, MIXED, engine.rank, engine.world_size):
        engine.backward(engine(*batch)[0])
    engine.step(frozenset(), 0.0)  # the dry run
    assert not changed(still, by_key(engine))[1], f"{case}: nothing was live"


def all_cases() -> None:
    for stage, precision, offload in STAGES:
        check_freeze(stage, precision, "exact", offload)
    check_freeze(0, "fp32", "zero_grad")
    check_freeze(2, "bf16", "zero_grad")


@pytest.mark.parametrize("world_size", [1, 2])
def test_frozen_keys_keep_every_bit(world_size):
    run_ranks(all_cases, world_size)


def check_step_without_targets(stage: int, precision: str, offload: bool = False, masked_update: str = "exact") -> None:
    """As `data.token_filter` makes one, on all ranks or on one of them."""
    from sgtm.distributed.engine import Engine
    from sgtm.distributed.process_group import init_distributed
    from sgtm.training.step import StepTotals, train_step

    case = f"ZeRO {stage} {precision} {masked_update}{' offloaded' * offload}"
    config = run_config(stage, "gpt_neo", "torch", "sequence", precision=precision, offload=offload)
    config = config.model_copy(
        update={"optimizer": config.optimizer.model_copy(update={"masked_update": masked_update})}
    )
    init_distributed(config.distributed, config.kernels)
    engine = Engine(model_of("gpt_neo"), config)
    totals = StepTotals(len(config.space.labels), engine.device)
    mine = random_step("sequence")[engine.rank :: engine.world_size]
    empty = [replace(batch, targets=torch.full_like(batch.targets, IGNORE)) for batch in mine]
    train_step(engine, mine, config.tables, 1e-2, totals)
    old, steps = state_of(engine), dict(engine.optimizer.steps)
    train_step(engine, [replace(batch, step_targets=0) for batch in empty], config.tables, 1e-2, totals)
    new = state_of(engine)
    assert all(torch.equal(old[key], new[key]) for key in old), f"{case}: something moved"
    assert engine.optimizer.steps == steps and totals.skipped == 0, case
    train_step(engine, empty if engine.rank else mine, config.tables, 1e-2, totals)
    moved = [not torch.equal(new[key], piece) for key, piece in state_of(engine).items() if key[1][0] == "weight"]
    assert any(moved) and engine.finite, f"{case}: rank 0 has targets"


def steps_without_targets() -> None:
    for stage, precision, offload in STAGES:
        check_step_without_targets(stage, precision, offload)
    check_step_without_targets(2, "fp32", masked_update="zero_grad")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_without_targets_changes_nothing(world_size):
    run_ranks(steps_without_targets, world_size)
