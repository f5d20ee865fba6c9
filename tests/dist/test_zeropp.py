"""ZeRO++: a second sharding of the weights changes no bit; what is quantised is refused where it would break a promise.

The quantising kernels need CUDA and are not run; of them only what DeepSpeed is told is seen.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import new_engine, save
from ranks import run_ranks
from tiny import FORGET, MIXED, tiny_config, tiny_step

from sgtm.model.rows import live_keys
from sgtm.run.resume import load_checkpoint


def trained(folder: str, hpz: int, precision: str, offload: bool) -> tuple[list[float], list[torch.Tensor]]:
    """Losses, and this rank's weights and moments, after mixed and pure forget steps on ZeRO 3; resumed in between."""
    distributed = {"zero_hpz_partition_size": hpz, "offload_optimizer": offload}
    config = tiny_config(3, precision, optimizer={"grad_clip": 0.0}, distributed=distributed)
    engine = new_engine(config)
    losses = train(engine, range(2))
    saved = save(engine, Path(folder, f"{hpz}-{precision}-{offload}"), 2, config)
    resumed = new_engine(config, seed=7)
    train(resumed, [9])  # as the dry run before the first step
    load_checkpoint(resumed, saved, config)
    later = train(engine, range(2, 4))
    assert train(resumed, range(2, 4)) == later
    assert all(map(torch.equal, pieces(resumed), pieces(engine)))
    return losses + later, pieces(engine)


def train(engine, steps) -> list[float]:
    losses, config = [], engine.config
    for step in steps:
        labels = (FORGET,) * 8 if step % 2 else MIXED
        for batch in tiny_step(config, step, labels, engine.rank, engine.world_size):
            with torch.no_grad():
                engine(*batch)  # as in an evaluation: what it gathers is there when training goes on
            loss, _ = engine(*batch)
            second = {name for name, p in engine.module.named_parameters() if p.ds_secondary_tensor is not None}
            assert bool(second) == (config.distributed.zero_hpz_partition_size > 1)
            engine.backward(loss)
        engine.step(live_keys(config.tables, labels), 1e-2)
        losses.append(float(engine.all_reduce_sum(loss)))
    return losses


def pieces(engine) -> list[torch.Tensor]:
    """What this rank owns of weights and moments."""
    tensors = []
    for tensor, offset, _, start, end in engine.fragments:
        for part in (tensor, *engine.optimizer.state[tensor].values()):
            tensors.append(part.detach().reshape(-1)[offset : offset + end - start].clone())
    return tensors


def every_case(folder: str) -> None:
    cases = [("fp32", False), ("bf16", False), ("bf16", True)]
    expected = [
        trained(folder, 1, *case) for case in cases
    ]  # all before the first of 2: DeepSpeed keeps it for the process
    for case, (losses, weights) in zip(cases, expected, strict=True):
        sharded_losses, others = trained(folder, 2, *case)
        assert sharded_losses == losses, case
        assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True)), case
    with pytest.raises(ValueError, match="zero_hpz_partition_size 3 does not divide the number of ranks 4"):
        trained(folder, 3, "fp32", False)


def test_a_second_sharding_changes_no_bit(tmp_path: Path):
    run_ranks(every_case, 4, str(tmp_path))


def test_what_deepspeed_is_told():
    from sgtm.distributed.engine import deepspeed_config

    keys = {"zero_hpz_partition_size": 8, "zero_quantized_weights": True}
    config = tiny_config(
        3, masking={"strategy": "none", "joint": "free"}, train={"tokens_per_step": 96 * 6}, distributed=keys
    )
    assert deepspeed_config(config, 16, 100)["zero_optimization"].items() >= keys.items()
    other = deepspeed_config(tiny_config(2), 1, 100)["zero_optimization"]
    assert not other.keys() & {*keys, "zero_quantized_gradients", "offload_optimizer"}


@pytest.mark.parametrize(
    ("stage", "strategy", "key", "value", "message"),
    [
        (2, "none", "zero_hpz_partition_size", 2, "ZeRO 2 does not have it; set zero_stage 3"),
        (1, "none", "zero_quantized_weights", True, "ZeRO 1 does not have it; set zero_stage 3"),
        (3, "sgtm", "zero_quantized_weights", True, "with masking.strategy sgtm frozen weights would not keep"),
        (3, "none", "zero_quantized_gradients", True, "take fp16 alone"),
    ],
)
def test_refused(stage: int, strategy: str, key: str, value: object, message: str):
    with pytest.raises(ValueError, match=f"{key}: .*{message}"):
        tiny_config(stage, masking={"strategy": strategy, "joint": "free"}, distributed={key: value})
