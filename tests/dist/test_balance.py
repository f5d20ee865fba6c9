"""The loss that balances experts in every ZeRO stage, on one rank and two: the gradient is that of one process.

A weight that a stage, a rank or an accumulation multiplied would show: the moments after a step are those of the
gradient of all micro-batches together.
"""

from __future__ import annotations

import pytest
import torch
from engines import assemble, shard_everything
from families import gradients, model_of, random_step, run_config
from ranks import run_ranks

WEIGHT = 3.0
CASES = [(stage, mixing) for stage in range(4) for mixing in ("micro", "token")]


def measure() -> list[tuple[dict[str, torch.Tensor], dict, float]]:
    """Of each case: first moments after a step, what the log has of the experts, and the loss of all ranks."""
    from sgtm.distributed.engine import Engine
    from sgtm.distributed.process_group import init_distributed
    from sgtm.model.output_norms import OutputNorms
    from sgtm.training.step import StepTotals, train_step

    shard_everything()
    results = []
    for stage, mixing in CASES:
        config = run_config(stage, "mixtral", "torch", mixing, balance=WEIGHT)
        init_distributed(config.distributed, config.kernels)
        engine = Engine(model_of("mixtral", activation_checkpointing=stage % 2 == 1), config)
        totals, norms = StepTotals(len(config.space.labels), engine.device), OutputNorms(config.tables)
        mine = random_step(mixing)[engine.rank :: engine.world_size]
        train_step(engine, mine, config.tables, 1e-2, totals, norms=norms)
        moments = assemble(engine, lambda f, engine=engine: engine.optimizer.state[f.tensor]["exp_avg"].reshape(-1))
        sums, counts = totals.take(engine)
        shares = {label: parts["experts"] for label, parts in norms.take(engine.all_reduce_sum).items()}
        results.append((moments, shares, float(sums.sum() / counts.sum())))
    return results


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_stage_adds_the_gradient_of_one_process(world_size):
    for (stage, mixing), (moments, shares, loss) in zip(CASES, run_ranks(measure, world_size)[0], strict=True):
        config, model, batches = run_config(stage, "mixtral", "torch", mixing), model_of("mixtral"), random_step(mixing)
        expected, plain = (gradients(model, batches, config.tables, weight) for weight in (WEIGHT, 0.0))
        for name, gradient in expected.items():
            wanted = (1 - config.optimizer.betas[0]) * gradient.flatten()
            error = (moments[name] - wanted).abs().max() / wanted.abs().max()
            assert error < 1e-5, (stage, mixing, name, float(error))
        router = "blocks.0.mlp.router"
        assert (expected[router] - plain[router]).norm() > 0.1 * plain[router].norm()
        assert shares["retain"].keys() == {"retain"} and shares["forget:bio"].keys() == {"retain", "bio"}
        with torch.no_grad():
            losses = [model(b.input_ids, b.targets, b.plan(config.tables), 1 / b.step_targets)[0] for b in batches]
        assert loss == pytest.approx(float(sum(losses)), rel=1e-5)
