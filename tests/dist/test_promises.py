"""The two promises of the method under real DeepSpeed, seen through the optimizer: every ZeRO stage, 1 and 2 ranks.

Twin runs differ in nothing but the content of one label's tokens in their last step. Whatever those tokens may not
update must end with the same bits: weights and both moments. Then a step of that label alone leaves the same things
where they were. What the label may update must differ, and move. `none` keeps no label from anything, so there all
must move; in exchange, twin runs that differ in nothing but the labels end with the same bits.

Any two values of the axes below that go together meet in a case (strategy, stage and ranks all three), and every case
runs on 1 and 2 ranks.

Not seen here: `active` or `route` ignored by an op, as the weights stay masked (tests/kernels,
tests/unit/test_transformer.py).
"""

import gc
from collections import Counter
from dataclasses import replace
from itertools import combinations, product
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from families import (
    BIO,
    CODE,
    DENSE,
    FAMILIES,
    MIXINGS,
    OPEN_BIO,
    OPEN_CODE,
    RETAIN,
    STRATEGIES,
    UNLABELED,
    contribution,
    model_of,
    plan_of,
    random_step,
    relabelled,
    run_config,
    state_of,
    with_content,
)
from ranks import run_ranks

from sgtm.config.schema import Config
from sgtm.model.rows import live_keys


class Case(NamedTuple):
    stage: int
    strategy: str
    mixing: str
    model: tuple[str, str]  # family and backend, one axis: an op of one family's has a backend of its own
    precision: str
    domain: int
    offload: bool
    embedding: str | int
    tied: bool
    opened: bool  # what is unlabeled elsewhere is trained as `open:<domain>`
    balance: float = 0.0  # weight of the loss that balances experts

    @property
    def shape(self) -> dict:
        """Of the model, besides family and backend."""
        return {"embedding": self.embedding, "tie_embeddings": self.tied}

    @property
    def rest(self) -> int:
        """The label of the tokens that are neither retain nor a domain's."""
        return OPEN[self.domain] if self.opened else UNLABELED

    def step(self, mixing: str, seed: int, label: int, sequences: int = 2) -> list:
        rows = 3 if self.model[1] == "triton" else 8  # its interpreter is slow
        return relabelled(random_step(mixing, seed, label, sequences, rows), {UNLABELED: self.rest})


BACKENDS = ("reference", "torch")
MODELS = tuple(product(DENSE, BACKENDS))
OPEN = {BIO: OPEN_BIO, CODE: OPEN_CODE}
AXES = Case(
    (0, 1, 2, 3),
    tuple(STRATEGIES),
    MIXINGS,
    MODELS,
    ("fp32", "bf16"),
    (BIO, CODE),
    offload=(False, True),
    embedding=("none", "full", 3),
    tied=(False, True),
    opened=(False, True),
    balance=(0.0,),
)
STAGE, MODEL, OFFLOAD, TIED = (Case._fields.index(name) for name in ("stage", "model", "offload", "tied"))
NEVER = {((STAGE, 0), (OFFLOAD, True))} | {((MODEL, ("gpt_neo", backend)), (TIED, False)) for backend in BACKENDS}


def pairs(case: tuple) -> list[tuple]:
    """The values of every two axes."""
    return list(combinations(enumerate(case), 2))


def covering_cases() -> list[Case]:
    """Every strategy in every stage; on each other axis in turn the value whose pairs have been seen least so far."""
    seen, cases = Counter(), []
    for case in product(*AXES[:2]):
        for axis in AXES[2:]:
            longer = [(*case, value) for value in axis if not NEVER.intersection(pairs((*case, value)))]
            case = max(longer, key=lambda case: sum(0.03 ** seen[pair] for pair in pairs(case)))
        cases.append(Case(*case))
        seen.update(pairs(case))
    return cases


def expert_cases() -> list[Case]:
    """Every strategy once, with experts in place of the MLP: stages and mixings in turn."""
    cases = {(case.strategy, case.stage): case for case in covering_cases()}
    chosen = [cases[strategy, number % 4] for number, strategy in enumerate(STRATEGIES)]
    return [
        case._replace(
            model=("mixtral", "torch"),
            mixing=MIXINGS[(number + number // 4) % 4],
            balance=(0.0, 3.0)[number // 4 % 2],
        )
        for number, case in enumerate(chosen)
    ]


def test_experts_are_trained_in_every_stage_and_mixing():
    cases = expert_cases()
    assert [case.strategy for case in sorted(cases, key=lambda case: AXES.strategy.index(case.strategy))] == [
        *STRATEGIES
    ]
    for axis in ("stage", "mixing", "precision", "domain", "offload", "embedding", "tied", "opened"):
        assert {getattr(case, axis) for case in cases} == {*getattr(AXES, axis)}, axis
    assert {(case.stage, case.balance) for case in cases} == {*product(AXES.stage, (0.0, 3.0))}


def test_any_two_values_meet_in_a_case():
    met = {pair for case in covering_cases() for pair in pairs(case)}
    axes = combinations(enumerate(AXES), 2)
    all_pairs = {((a, x), (b, y)) for (a, these), (b, those) in axes for x, y in product(these, those)}
    assert met == all_pairs - NEVER


def config_of(case: Case) -> Config:
    return run_config(
        case.stage,
        *case.model,
        case.mixing,
        strategy=case.strategy,
        precision=case.precision,
        offload=case.offload,
        opened=case.opened,
        balance=case.balance,
        **case.shape,
    )


def train_step(engine, batches) -> None:
    tables, balance = engine.config.tables, engine.config.train.expert_balance
    for batch in batches[engine.rank :: engine.world_size]:
        plan = plan_of(batch, tables)
        engine.backward(engine(batch.input_ids, batch.targets, plan, 1 / batch.step_targets, None, balance)[0])
    engine.step(live_keys(tables, batches[0].step_labels), lr=1e-2)


def moved_keys(old: dict, new: dict) -> set[str]:
    """Keys of which any element differs in any bit, on any rank."""
    mine = {key for key, index in old if not torch.equal(old[key, index], new[key, index])}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return set().union(*everyone)


def trained(case: Case, steps: list) -> tuple:
    """A new engine that has been through these steps, and its state."""
    from sgtm.distributed.engine import Engine

    engine = Engine(model_of(*case.model, **case.shape), config_of(case))
    for batches in steps:
        train_step(engine, batches)
    return engine, state_of(engine)


def unlabeled(batch):
    """The same tokens without a label."""
    return replace(batch, labels=(UNLABELED,) * len(batch.labels), step_labels=frozenset({UNLABELED}))


def check_case(case: Case, *labels: int) -> None:
    tables, sequences, steps = config_of(case).tables, config_of(case).train.micro_batch, []
    for label in labels:
        if not steps or case.mixing == "step":
            steps = [case.step(case.mixing, 1, UNLABELED), case.step(case.mixing, 2, label)]
            engine, state = trained(case, steps)
        keys = {key for key, _ in state}
        free = {key for key in keys if contribution(tables, key, label) == 0}
        assert not free if case.strategy == "none" else len(free) >= 2, f"{case} {label}: what is promised is {free}"
        first, last = steps
        other = trained(case, [first, [with_content(batch, [label], seed=9) for batch in last]])[1]
        moved = moved_keys(state, other)
        assert moved == keys - free, f"{case} {label}: broken {moved & free}, vacuous {keys - free - moved}"

        alone = case.step("step", 3, label, sequences) * (engine.accumulation * engine.world_size // 2)
        before = state_of(engine)
        train_step(engine, alone)
        assert moved_keys(before, state_of(engine)) == keys - free, f"{case}: a step of {label} alone"

    if case.strategy == "none":
        bare = trained(case, [[unlabeled(batch) for batch in batches] for batches in steps])[1]
        assert not moved_keys(state, bare), f"{case}: the labels change {moved_keys(state, bare)}"


def triton_cases() -> list[Case]:
    """Sharded parameters, and labels that change inside the sequences; fp32, which Triton's interpreter can do."""
    shared = {"offload": False, "embedding": "none", "opened": False}
    return [
        Case(3, "sgtm+masked", "token", (family, "triton"), "fp32", BIO, tied=model.tie_embeddings, **shared)
        for family, model in FAMILIES.items()
        if family in DENSE
    ]


def all_cases() -> None:
    check_cases(covering_cases(), others=True)


def all_expert_cases() -> None:
    check_cases(expert_cases(), others=True)


def all_triton_cases() -> None:
    check_cases(triton_cases(), others=False)


def check_cases(cases: list[Case], others: bool) -> None:
    """Every case with its domain, and others: with its open label, or retain where it has none."""
    from sgtm.distributed.process_group import init_distributed

    any_config = config_of(cases[0])
    init_distributed(any_config.distributed, any_config.kernels)
    for case in cases:
        check_case(case, case.domain, *([case.rest if case.opened else RETAIN] if others else []))
        if case is cases[0]:
            gc.freeze()  # everything is imported, and DeepSpeed collects garbage at each start of ZeRO-3: 0.3 s


@pytest.mark.parametrize("world_size", [1, 2])
def test_promises(world_size):
    run_ranks(all_cases, world_size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_promises_with_experts(world_size):
    run_ranks(all_expert_cases, world_size)


def test_promises_of_the_kernels_in_the_interpreter():
    run_ranks(all_triton_cases, 2)
