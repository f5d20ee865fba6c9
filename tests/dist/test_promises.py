"""The two promises of the method under real DeepSpeed, seen through the optimizer: every ZeRO stage, 1 and 2 ranks.

Twin runs differ in nothing but the content of one label's tokens in their last step. Whatever those tokens may not
update must end with the same bits: weights and both moments. Then steps of one label alone leave the same things
where they were.

Faults tried, each seen to fail: the mask dropped from one part of one op; documents not isolated; a segment reaching
into the next; frozen segments updated; too many keys live; momentum decayed without an update; the labels of runs
swapped.
"""

import pytest
import torch
import torch.distributed as dist
from families import (
    BIO,
    CONTEXT,
    FAMILIES,
    RETAIN,
    SPACE,
    by_key,
    contribution,
    model_of,
    plan_of,
    random_step,
    with_content,
)

from sgtm.config.schema import Config
from sgtm.distributed.segments import full_numel
from sgtm.distributed.testing import run_ranks
from sgtm.model.rows import live_keys

# stage, precision, family, mixing, strategy
CASES = [
    (0, "fp32", "gpt_neo", "sequence", "sgtm+masked"),
    (0, "bf16", "llama", "token", "sgtm"),
    (1, "fp32", "llama", "token", "gram"),
    (1, "bf16", "gpt_neo", "sequence", "sgtm+masked"),
    (2, "fp32", "gpt_neo", "token", "no_mlp_out+masked"),
    (2, "bf16", "llama", "sequence", "activation_masking"),
    (3, "fp32", "llama", "sequence", "sgtm+masked"),
    (3, "bf16", "gpt_neo", "token", "gradient_routing"),
]


def config_of(stage: int, precision: str, family: str, mixing: str, strategy: str) -> Config:
    name, _, joint = strategy.partition("+")
    share = FAMILIES[family].heads // FAMILIES[family].num_kv_heads
    micro_batch = len(random_step(mixing)[0].input_ids)
    return Config.model_validate(
        {
            "model": FAMILIES[family].model_dump(),
            "masking": {
                "domains": list(SPACE.domains),
                "strategy": name,
                "joint": joint or "free",
                "forget_heads": share,
                "forget_neurons": {"bio": 3, "code": 1},
            },
            "optimizer": {"lr": 1e-2, "warmup_steps": 0, "grad_clip": 0.0},
            "train": {"steps": 8, "tokens_per_step": 2 * micro_batch * CONTEXT, "micro_batch": micro_batch}
            | {"precision": precision},
            "data": {"mixing": mixing},
            "distributed": {"zero_stage": stage, "timeout_minutes": 1},
        }
    )


def train_step(engine, batches) -> None:
    tables = engine.config.tables
    for batch in batches[engine.rank :: engine.world_size]:
        plan = plan_of(batch, tables)
        engine.backward(engine(batch.input_ids, batch.targets, plan, 1 / batch.step_targets)[0])
    engine.step(live_keys(tables, batches[0].step_labels), lr=1e-2)


def state_of(engine) -> dict:
    """Weights and moments by (key, (what, parameter, first element)); 0 where another rank owns them."""
    state = {}
    numels = {name: full_numel(p) for name, p in engine.module.named_parameters()}
    for what in ("weight", "exp_avg", "exp_avg_sq"):
        flat = {name: torch.zeros(numel) for name, numel in numels.items()}
        for tensor, offset, name, start, end in engine.fragments:
            source = tensor if what == "weight" else engine.optimizer.state[tensor][what]
            flat[name][start:end] = source.detach().reshape(-1)[offset : offset + end - start]
        for (key, name, start), piece in by_key(engine.module, flat).items():
            state[key, (what, name, start)] = piece
    return state


def moved_keys(old: dict, new: dict) -> set[str]:
    """Keys of which any element differs in any bit, on any rank."""
    mine = {key for key, place in old if not torch.equal(old[key, place], new[key, place])}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return set().union(*everyone)


def check_case(case: tuple) -> None:
    from sgtm.distributed.engine import Engine

    config = config_of(*case)
    steps = [random_step(case[3], seed) for seed in (1, 2)]

    def trained(replaced: tuple[int, ...] = ()):
        engine = Engine(model_of(case[2]), config)
        train_step(engine, steps[0])
        train_step(engine, [with_content(batch, replaced, seed=9) for batch in steps[1]])
        return engine, state_of(engine)

    engine, state = trained()
    keys = {key for key, _ in state}
    for label in (BIO, RETAIN):
        free = {key for key in keys if contribution(config.tables, key, label) == 0}
        assert len(free) >= 2, "the promise says nothing here"
        moved = moved_keys(state, trained((label,))[1])
        assert moved == keys - free, f"{case} {label}: broken {moved & free}, vacuous {keys - free - moved}"

    for label in (BIO, RETAIN):
        before = state_of(engine)
        train_step(engine, random_step("step", 3, label, sequences=config.train.micro_batch))
        free = {key for key in keys if contribution(config.tables, key, label) == 0}
        assert moved_keys(before, state_of(engine)) == keys - free, f"{case}: a step of {label} alone"


def all_cases() -> None:
    from sgtm.distributed.engine import init_distributed

    init_distributed(config_of(*CASES[0]))
    for case in CASES:
        check_case(case)


@pytest.mark.parametrize("world_size", [1, 2])
def test_promises(world_size):
    run_ranks(all_cases, world_size, timeout=240)
