"""Output norms in every ZeRO stage on two ranks: those of one process, and not a bit of the training changes.

ZeRO-3 here keeps nothing whole that it could shard.
"""

from __future__ import annotations

import pytest
import torch
from engines import shard_everything
from families import model_of, plan_of, random_step, run_config, state_of
from ranks import run_ranks

from sgtm.model.output_norms import OutputNorms

HOW = {"token": "fp32", "micro": "bf16"}
CASES = [(stage, mixing) for stage in range(4) for mixing in HOW]


def train(stage: int, mixing: str, measured: bool) -> tuple:
    """Two steps: the norms of the first, losses, weights and moments."""
    from sgtm.distributed.engine import Engine
    from sgtm.distributed.process_group import init_distributed
    from sgtm.training.step import StepTotals, train_step

    config = run_config(stage, "gpt_neo", "torch", mixing, precision=HOW[mixing])
    shard_everything()
    init_distributed(config.distributed, config.kernels)
    engine = Engine(model_of("gpt_neo", activation_checkpointing=stage == 2), config)
    totals, losses, taken = StepTotals(len(config.space.labels), engine.device), {}, []
    for step in range(2):
        norms = OutputNorms(config.tables) if measured else None
        mine = random_step(mixing, step)[engine.rank :: engine.world_size]
        train_step(engine, mine, config.tables, 1e-2, totals, norms=norms)
        losses |= {(step, index): loss for index, loss in enumerate(engine.losses)}
        taken += [norms.take(engine.all_reduce_sum)] if measured else []
    return taken[:1], losses, state_of(engine)


def measure() -> list[dict]:
    """The norms of each case; raises where measuring has changed a bit."""
    norms = []
    for case in CASES:
        _, *plain = train(*case, measured=False)
        taken, *rest = train(*case, measured=True)
        for before, after in zip(plain, rest, strict=True):
            assert before.keys() == after.keys()
            for key, value in before.items():
                tensors = (
                    zip(value.values(), after[key].values(), strict=True)
                    if isinstance(value, dict)
                    else [(value, after[key])]
                )
                assert all(torch.equal(a, b) for a, b in tensors), (case, key)
        norms += taken
    return norms


def test_every_stage_measures_what_one_process_does_and_trains_as_without():
    ranks = run_ranks(measure, 2)
    assert ranks[0] == ranks[1]
    for (stage, mixing), measurement in zip(CASES, ranks[0], strict=True):
        precision, bound = (torch.float32, 1e-4) if HOW[mixing] == "fp32" else (torch.bfloat16, 1e-2)
        config, model = run_config(stage, "gpt_neo", "torch", mixing), model_of("gpt_neo").to(precision)
        norms = OutputNorms(config.tables)
        for batch in random_step(mixing):
            model(batch.input_ids, batch.targets, plan_of(batch, config.tables), 1.0, norms)
        expected = norms.take()
        assert measurement.keys() == expected.keys() == {"unlabeled", "retain", "forget:bio", "forget:code"}
        for label, parts in expected.items():
            assert measurement[label]["residual"] == pytest.approx(parts["residual"], rel=bound)
            for part in ("attention", "mlp"):
                assert measurement[label][part].keys() == parts[part].keys()
                for group, by_layer in parts[part].items():
                    assert measurement[label][part][group] == pytest.approx(by_layer, rel=bound), (
                        stage,
                        mixing,
                        label,
                        group,
                    )
