"""The optimizer in the host's memory gives the same bits, and a run with it resumes.

On a CPU host and device are one, so that only DeepSpeed's path is seen, not its copies. Freeze, promises and gradients
with it are among the cases of test_freeze.py, test_promises.py and test_engine.py.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from engines import save, train
from ranks import run_ranks
from tiny import tiny_config, tiny_model

STEPS = 4


def state(engine) -> list[torch.Tensor]:
    """Weights and moments of this rank's share of every parameter, and the counts."""
    pieces = [torch.tensor(list(engine.optimizer.steps.values()))]
    for tensor, offset, _, start, end in engine.fragments:
        moments = engine.optimizer.state[tensor]
        for part in (tensor, moments["exp_avg"], moments["exp_avg_sq"]):
            pieces.append(part.detach().reshape(-1)[offset : offset + end - start].clone())
    return pieces


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def every_case(folder: str) -> None:
    from sgtm.distributed.engine import Engine
    from sgtm.distributed.process_group import init_distributed
    from sgtm.run.resume import load_checkpoint

    any_config = tiny_config()
    init_distributed(any_config.distributed, any_config.kernels)
    for stage, precision in product((1, 2, 3), ("fp32", "bf16")):
        case, run = f"ZeRO {stage} {precision}", Path(folder, f"{stage}-{precision}")

        def engine(offload: bool, seed: int = 0, stage=stage, precision=precision):
            sections = {"optimizer": {"grad_clip": 0.0}, "distributed": {"offload_optimizer": offload}}
            config = tiny_config(stage, precision, **sections)
            return Engine(tiny_model(config, seed), config)

        plain, offloaded = engine(False), engine(True)
        assert offloaded._deepspeed.zero_use_cpu_optimizer() and not plain._deepspeed.zero_use_cpu_optimizer()
        losses = train(plain, range(STEPS))
        assert train(offloaded, range(2)) == losses[:2], case
        saved = save(offloaded, run, 2, offloaded.config)
        assert train(offloaded, range(2, STEPS)) == losses[2:], case
        assert same(state(offloaded), state(plain)), f"{case}: another run than without offload"

        for offload in (True, False):  # off again: another class of DeepSpeed's, in some cases
            resumed = engine(offload, seed=7)
            done, _, reshaped = load_checkpoint(resumed, saved, resumed.config)
            assert done == 2 and ("distributed.offload_optimizer" in reshaped) == (not offload)
            assert train(resumed, range(2, STEPS)) == losses[2:], f"{case}: resumed, offload {offload}"
            assert same(state(resumed), state(offloaded)), f"{case}: the resumed run is another one, offload {offload}"


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_same_bits_and_a_checkpoint_that_resumes(tmp_path, world_size):
    run_ranks(every_case, world_size, str(tmp_path))


def backends() -> list[str]:
    from sgtm.distributed.engine import Engine
    from sgtm.distributed.process_group import init_distributed

    names = []
    for backend, offload in product(("reference", "triton"), (False, True)):
        config = tiny_config(2, kernels={"backend": backend}, distributed={"offload_optimizer": offload})
        init_distributed(config.distributed, config.kernels)
        names.append(Engine(tiny_model(config), config).optimizer.backend)
    return names


def test_adamw_runs_on_the_host():
    assert run_ranks(backends, 1) == [["reference", "reference", "triton", "torch"]]


def test_stage_0_has_nothing_to_offload():
    with pytest.raises(ValueError, match=r"offload_optimizer: ZeRO 0 .* set zero_stage 1, 2 or 3"):
        tiny_config(0, distributed={"offload_optimizer": True})
