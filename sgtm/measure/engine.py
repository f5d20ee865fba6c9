"""The training steps of one config through the engine, under each mask that its strategy has.

Sequences are label-pure and dealt to the micro-batches evenly, as `data.mixing: sequence` does, whatever the config's
mixing is. Pure forget is of the first domain; where sequences are mixed the domains take turns.
"""

from __future__ import annotations

from functools import partial

import torch

from sgtm.config import Config
from sgtm.distributed.engine import Engine
from sgtm.masking.labels import FIRST_FORGET, RETAIN, UNLABELED
from sgtm.masking.strategy import JOINT, build_tables, joint_kinds
from sgtm.measure.cases import NONE, NOTHING, PURE, Case, dealt, random_batches
from sgtm.measure.rounds import LocalStep
from sgtm.training.dry_run import dry_run
from sgtm.training.initial_model import initial_model
from sgtm.training.step import StepTotals, train_step
from sgtm_kernels.plan import Tables


def label_cases(config: Config, world_size: int) -> dict[str, Case]:
    """The rows: tables, and the label of each of a rank's sequences in a step.

    Raises ValueError for fewer than 4 sequences, and where the ranks cannot share a step.
    """
    m, space, micro_batches = config.masking, config.space, config.accumulation(world_size)
    n = micro_batches * config.micro_batch
    if n < 4:
        raise ValueError(
            f"train.tokens_per_step {config.train.tokens_per_step} is {n} sequences of {config.model.context} for each "
            f"rank; a row with a quarter of forget sequences needs 4: --train.tokens_per_step "
            f"{4 * config.model.context * world_size}"
        )
    none, some = build_tables(space, NONE), round(n / 4)
    forget = sorted((FIRST_FORGET + i % len(space.domains) for i in range(some)), reverse=True)
    pure = PURE if len(space.domains) == 1 else f"{PURE} ({space.domains[0]})"

    def case(tables: Tables, labels: list[int], percent: int = 0) -> Case:
        return Case(tables, dealt(labels, micro_batches, config.model.context), percent, ("sequence",))

    cases = {
        NONE: case(none, [UNLABELED] * n),
        NOTHING: case(config.tables, [UNLABELED] * n),
        f"{some / n:.0%} forget sequences".replace("%", " %"): case(
            config.tables, forget + [UNLABELED] * (n - some), round(100 * some / n)
        ),
        pure: case(config.tables, [FIRST_FORGET] * n, 100),
    }
    if set(joint_kinds(m.strategy, m.joint)) < set(JOINT["masked"]):
        joint = build_tables(space, m.strategy, "masked", m.cross_domain, m.overrides)
        cases[f"{pure}, joint masked"] = case(joint, [FIRST_FORGET] * n, 100)
    return cases | {"pure retain": case(config.tables, [RETAIN] * n)}


def engine_steps(config: Config, cases: dict[str, Case]) -> dict[str, LocalStep]:
    """A training step of this config in each case. Needs `init_distributed`.

    Raises ValueError where a step does not fit into memory or blocks cannot be compiled.
    """
    engine = Engine(initial_model(config), config)
    dry_run(engine, config.tables)
    tokens = config.train.tokens_per_step
    steps = {}
    for name, case in cases.items():
        batches = random_batches(case.batches, config.model, torch.device("cpu"), step_targets=tokens)
        totals = StepTotals(len(case.tables.labels), engine.device)
        steps[name] = LocalStep(partial(train_step, engine, batches, case.tables, config.optimizer.lr, totals))
    return steps
