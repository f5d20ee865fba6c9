"""Compiled blocks on two ranks: the losses of the model as it is, no graph more than at the first step.

ZeRO-3 here keeps nothing whole that it could shard.
"""

from __future__ import annotations

import pytest
import torch
from engines import shard_everything
from families import MIXINGS, STRATEGIES, model_of, plan_of, random_step, run_config
from ranks import run_ranks
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef

from sgtm.model.rows import live_keys

STEPS, WARM_UP = 3, 1


def train(stage: int, family: str, compiled: bool, checkpointing: bool) -> tuple[list[float], list[int], int]:
    """Losses of a few mixed steps, graphs after each step, and weights of blocks held between forward and backward."""
    from sgtm.distributed.engine import Engine

    config = config_of(stage, family, compiled)
    shard_everything()
    model = model_of(family, activation_checkpointing=checkpointing)
    counter = CompileCounterWithBackend("aot_eager")
    if compiled:
        from sgtm.model.compile import compile_blocks

        torch._dynamo.reset()
        compile_blocks(model, counter)
    engine = Engine(model, config)
    gathered: list[StorageWeakRef] = []
    for block in model.blocks:  # after DeepSpeed's hook, which gathers
        block.register_forward_pre_hook(lambda block, _: gathered.extend(weights(block)))
    losses, graphs = [], []
    for step in range(STEPS):
        batches = random_step("sequence", step)
        for batch in batches[engine.rank :: engine.world_size]:
            gathered.clear()
            plan = plan_of(batch, config.tables)
            loss, _ = engine(batch.input_ids, batch.targets, plan, 1 / batch.step_targets)
            held = sum(not storage.expired() for storage in gathered)
            engine.backward(loss)
            losses.append(loss.item())
        engine.step(live_keys(config.tables, batches[0].step_labels), lr=1e-2)
        graphs.append(counter.frame_count)
    return losses, graphs, held


def config_of(stage: int, family: str, compiled: bool):
    config = run_config(stage, family, "torch", "sequence")
    keys = {"compile": "blocks" if compiled else "off"}
    return config.model_copy(update={"train": config.train.model_copy(update=keys)})


def weights(block: torch.nn.Module) -> list[StorageWeakRef]:
    assert all(p.numel() for p in block.parameters() if p.dim() > 1) or not hasattr(block, "_z3_leaf")
    return [StorageWeakRef(p.untyped_storage()) for p in block.parameters() if p.numel()]


def every_mode(stage: int, family: str) -> list[tuple]:
    from sgtm.distributed.process_group import init_distributed

    config = run_config(stage, family, "torch", "sequence")
    init_distributed(config.distributed, config.kernels)
    return [train(stage, family, *mode) for mode in ((False, False), (True, False), (True, True))]


@pytest.mark.parametrize(("stage", "family"), [(1, "gpt_neo"), (2, "llama"), (3, "gpt_neo")])
def test_compiled_blocks_on_two_ranks(stage, family):
    layers = {"gpt_neo": 2, "llama": 1}[family]
    for (plain, _, _), *compiled in run_ranks(every_mode, 2, stage, family):
        assert plain[0] != plain[-1]
        for losses, graphs, held in compiled:
            assert losses == pytest.approx(plain, abs=2e-6)
            assert graphs == [layers] * STEPS
            assert (held == 0) == (stage == 3)


def under_every_mask(stage: int) -> tuple[list[float], list[float], int, int]:
    """Losses as it is and compiled, a step of one micro-batch in every strategy and mixing; graphs, and signatures."""
    from sgtm.distributed.engine import Engine
    from sgtm.distributed.process_group import init_distributed
    from sgtm.model.compile import compile_blocks

    configs = [config_of(stage, "gpt_neo", compiled) for compiled in (False, True)]
    init_distributed(configs[0].distributed, configs[0].kernels)
    torch._dynamo.reset()
    models, counter = [model_of("gpt_neo") for _ in configs], CompileCounterWithBackend("aot_eager")
    compile_blocks(models[1], counter)
    engines, losses, signatures = list(map(Engine, models, configs)), ([], []), set()
    for strategy in STRATEGIES.values():
        tables = strategy()
        for seed, mixing in enumerate(MIXINGS):
            batch = random_step(mixing, seed)[engines[0].rank]
            signatures.add((plan_of(batch, tables).signature, batch.input_ids.shape))
            for engine, history in zip(engines, losses, strict=True):
                loss, _ = engine(batch.input_ids, batch.targets, plan_of(batch, tables), 1 / batch.step_targets)
                engine.backward(loss)
                history.append(loss.item())
                engine.step(live_keys(tables, batch.step_labels), lr=1e-3)
    return *losses, counter.frame_count, len(signatures)


@pytest.mark.parametrize("stage", [1, 3])
def test_every_strategy_and_mixing_on_two_ranks(stage):
    for plain, compiled, graphs, signatures in run_ranks(under_every_mask, 2, stage):
        assert len(set(plain)) > len(plain) / 2
        assert compiled == pytest.approx(plain, abs=2e-6)
        assert signatures <= graphs <= 2 * signatures  # global and local layers
