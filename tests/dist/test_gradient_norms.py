"""Gradient norms by group, and by label and group, from the shards; against autograd in one process.

Clipping is active: the limit is far below the norm.
"""

from __future__ import annotations

import json
import math
from itertools import product

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
    run_config,
    state_of,
)
from ranks import run_ranks

from sgtm.config import Config, load_config
from sgtm.masking.labels import JOINT_GROUP
from sgtm.run.metrics import read_metrics

LIMIT = 0.01
BOUND = 1e-5  # relative
CASES = [
    (stage, precision, offload)
    for stage, precision, offload in product((0, 1, 2, 3), ("fp32", "bf16"), (False, True))
    if stage or not offload
]


def expected_norms(config: Config, batches: list) -> dict[str, float]:
    """By group, of the whole step's gradient in one process, accumulated in fp32."""
    model = model_of("gpt_neo").to(torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
    total = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for batch in batches:
        for name, gradient in gradients(model, [batch], config.tables).items():
            total[name] += gradient
    squares = dict.fromkeys((*SPACE.groups, JOINT_GROUP), 0.0)
    for (key, _, _), piece in by_key(model, total).items():
        group = key.rpartition(".")[2]
        squares[group if group in SPACE.groups else JOINT_GROUP] += float(piece.double().square().sum())
    return {group: math.sqrt(square) for group, square in squares.items()}


def assert_norms(norms: dict[str, float], expected: dict[str, float], where: str) -> None:
    assert norms == pytest.approx(expected, rel=BOUND), where
    assert {group for group in norms if norms[group] == 0} == {g for g in expected if expected[g] == 0}, where


def check_case(stage: int, precision: str, offload: bool) -> None:
    from sgtm.distributed.engine import Engine
    from sgtm.distributed.process_group import init_distributed
    from sgtm.training.step import StepTotals, group_norms, only, probe, train_step

    config = run_config(stage, "gpt_neo", "torch", "token", precision=precision, offload=offload, grad_clip=LIMIT)
    case = f"ZeRO {stage} {precision}{' offloaded' * offload}"
    init_distributed(config.distributed, config.kernels)
    engine, other = (Engine(model_of("gpt_neo"), config) for _ in range(2))
    step, labels = random_step("token", 1), config.space.labels
    mine = step[engine.rank :: engine.world_size]

    probes = probe(engine, mine, config.tables)
    assert list(probes) == list(labels)
    for label in (UNLABELED, RETAIN, BIO, CODE):
        expected = expected_norms(config, [only(batch, label) for batch in step])
        assert_norms(probes[labels[label]], expected, f"{case}: {labels[label]}")
    assert probes["forget:bio"]["retain"] == probes["forget:bio"]["code"] == probes["retain"]["bio"] == 0.0
    assert min(probes["forget:bio"]["bio"], probes["retain"]["retain"], probes["unlabeled"]["retain"]) > 10 * LIMIT

    totals = [StepTotals(len(labels), engine.device) for _ in range(2)]
    for number in range(3):
        batches = random_step("token", number)[engine.rank :: engine.world_size]
        if number:
            probe(engine, batches, config.tables)
        train_step(engine, batches, config.tables, 1e-2, totals[0], measure=number == 0)
        if number == 0:
            norms = group_norms(engine.key_norms(), SPACE.groups)
            assert_norms(norms, expected_norms(config, random_step("token", 0)), f"{case}: the step's")
            assert math.hypot(*norms.values()) == pytest.approx(engine.grad_norm(), rel=1e-5), case
        train_step(other, batches, config.tables, 1e-2, totals[1])
        assert engine.grad_norm() == other.grad_norm(), case
    ours, theirs = state_of(engine), state_of(other)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs), f"{case}: the probe changes the run"
    assert engine.optimizer.steps == other.optimizer.steps
    ours, theirs = (t.state() for t in totals)
    assert all(torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])) for name in theirs), case
    resumed = StepTotals(len(labels), engine.device)
    resumed.restore([totals[0].state()] * engine.world_size, engine.rank, engine.world_size)
    share, factor = totals[0].take_clipping()
    assert resumed.take_clipping() == (share, factor), case
    assert share == 1.0 and 0 < factor < 0.1 and math.isnan(totals[0].take_clipping()[0])

    with pytest.raises(RuntimeError, match="without measure"):
        other.key_norms()
    spoiled = [(batch.input_ids, batch.targets, batch.plan(config.tables), math.inf) for batch in mine]
    for arguments in spoiled:
        engine.backward(engine(*arguments)[0])
    engine.step(frozenset(), 0.0, measure=True)
    assert set(engine.key_norms().values()) == {math.inf}, case


def all_cases() -> None:
    for case in CASES:
        check_case(*case)


@pytest.mark.parametrize("world_size", [1, 2])
def test_norms_are_those_of_autograd_and_measuring_changes_nothing(world_size):
    run_ranks(all_cases, world_size)


def train_runs(runs: str) -> None:
    from sgtm.training.loop import train

    options = ["--train.steps=7", "--train.log_every=2", "--optimizer.grad_clip=0.9", "--distributed.zero_stage=2"]
    for name, more in {"without": [], "probed": ["--train.probe_every=3"]}.items():
        train(load_config("debug", [*options, *more, f"--runs={runs}", f"--name={name}"]))


def without_clock(lines: list[dict]) -> str:
    lines = [line for line in lines if line["kind"] != "checkpoint"]
    return json.dumps([{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines])


def test_what_train_logs(tmp_path):
    run_ranks(train_runs, 2, str(tmp_path))
    without, probed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("without", "probed"))
    probes = [line for line in probed if line["kind"] == "probe"]
    assert without_clock([line for line in probed if line not in probes]) == without_clock(without)
    assert [line["step"] for line in probes] == [3, 6]
    for line in probes:
        assert set(line["grad_norms"]) == {"unlabeled", "retain", "forget:es"}
        assert line["grad_norms"]["forget:es"]["retain"] == line["grad_norms"]["retain"]["es"] == 0
    steps = [line for line in without if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [2, 4, 6, 7]
    for line in steps:
        groups = [line[f"grad_norm/{group}"] for group in ("retain", "es", "joint")]
        assert math.hypot(*groups) == pytest.approx(line["grad_norm"], rel=1e-4)
        assert sum(line[f"grad_share/{group}"] for group in ("retain", "es", "joint")) == pytest.approx(1, rel=1e-4)
        assert line["clipped"] in (0, 0.5, 1) and (line["clip_factor"] < 1) == (line["clipped"] > 0)
