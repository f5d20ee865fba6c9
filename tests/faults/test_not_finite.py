"""A run on two ranks whose loss is infinite on one of them, while the clock of the machine jumps."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
from ranks import run_ranks
from waiting import PATIENCE

OPTIONS = ["--train.steps=8", "--train.checkpoint_every=2", "--train.max_skipped_steps=3", "--distributed.zero_stage=2"]


def train_with_infinite_losses(runs: str) -> dict:
    """A run that meets one such step, one whose first is one and all from the third on, and that one resumed."""
    from sgtm.config import load_config
    from sgtm.distributed.engine import Engine
    from sgtm.run.checkpoint import find_latest, verify
    from sgtm.training.loop import train

    clock = iter(range(10**9, 0, -3600))
    time.time = lambda: float(next(clock))
    bad: set[int] = set()
    steps, inner = [0], Engine.backward

    def backward(engine, loss):
        number = steps[0] // engine.accumulation  # the dry run is step 0
        steps[0] += 1
        inner(engine, loss + math.inf if number in bad and engine.rank == 1 else loss)

    Engine.backward = backward

    def run(name: str, wrong: set[int], *options: str, resume: bool = False) -> Path:
        bad.clear()
        bad.update(wrong)
        steps[0] = 0
        return train(load_config("debug", [f"--runs={runs}", f"--name={name}", *OPTIONS, *options]), resume=resume)

    run("once", {3})
    outcome: dict = {}
    try:
        run("ever", {1, *range(3, 99)})
    except ValueError as error:
        outcome["stopped"], outcome["by"] = str(error), error.rank
    latest = find_latest(Path(runs, "ever"))
    verify(latest)
    outcome["latest"] = latest.name
    run("ever", {1}, "--train.max_skipped_steps=0", resume=True)
    return outcome


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_ranks(train_with_infinite_losses, 2, str(folder))


def lines(run: Path) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in records if line["kind"] == "step"]


def test_a_skipped_step_is_counted_and_training_goes_on(runs):
    steps = lines(runs[0] / "once")
    assert [line["skipped_steps"] for line in steps] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert [line["loss"] is None for line in steps] == [line["step"] == 3 for line in steps]
    assert steps[2]["grad_norm"] is None and steps[3]["grad_norm"] > 0


def test_so_many_in_a_row_stop_all_ranks_with_the_documents(runs):
    first, second = runs[1]
    assert first == second and first["by"] == 0
    assert "3 steps in a row were skipped" in first["stopped"]
    assert "step 5: the loss is inf in micro-batch 1 of rank 1" in first["stopped"]
    assert f"the last checkpoint is {runs[0] / 'ever/checkpoints/step_00000002'}" in first["stopped"]
    assert first["latest"] == "step_00000002", "none is saved, and none let go, while steps are skipped"


def test_resumed_it_goes_on_counting(runs):
    """From the checkpoint before the bad steps, which holds the count until then; one more is bad."""
    assert [line["skipped_steps"] for line in lines(runs[0] / "ever")] == [1, 1, 2, 2, 2, 2, 2, 2]


def test_seconds_of_training_go_forward(runs):
    for line in lines(runs[0] / "once") + lines(runs[0] / "ever"):
        assert 0 < line["seconds"] < PATIENCE and line["tokens_per_second"] > 0
