"""`train` with compiled blocks: every graph is made before the first step, and the losses are those without."""

from __future__ import annotations

import json
from functools import partial

import pytest
from ranks import run_ranks

from sgtm.config import load_config
from sgtm.data.open import open_corpus

BOUND = 2e-6  # as for other orders of sums: tests/e2e/test_same_losses.py
OPTIONS = ("--train.tokens_per_step=512", "--train.micro_batch=2", "--train.steps=6", "--optimizer.lr=0.01")
JOINT = "--masking.joint=masked"


def train(runs: str, backend: str, *cases: tuple[str, ...]) -> list[dict]:
    """Of a plain and a compiled run with each of these options: losses, and graphs before and after the steps."""
    import torch
    from torch._dynamo.utils import counters

    from sgtm.training import loop, start

    graphs, steps = [], loop._steps

    def watched(*args):
        graphs.append(counters["stats"]["unique_graphs"])
        steps(*args)
        graphs.append(counters["stats"]["unique_graphs"])

    loop._steps = watched
    start.compile_blocks = partial(start.compile_blocks, backend=backend)
    results = []
    for options in cases:
        for mode in ("off", "blocks"):
            counters.clear()
            torch._dynamo.reset()
            every = (*OPTIONS, *options, f"--runs={runs}", f"--name={mode}", f"--train.compile={mode}")
            run = loop.train(load_config("debug", list(every)), overwrite=True)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            results.append({"losses": [loss for line in lines for loss in losses(line)], "graphs": graphs[-2:]})
    return results


def refused(runs: str) -> str:
    from sgtm.training import loop

    with pytest.raises(ValueError) as error:
        loop.train(load_config("debug", [f"--runs={runs}", "--train.compile=blocks", "--kernels.backend=reference"]))
    return str(error.value)


def losses(line: dict) -> list[float]:
    if line["kind"] == "eval":
        return [loss for by_category in line["losses"].values() for loss in by_category.values()]
    return [value for key, value in line.items() if key.startswith("loss")]


@pytest.fixture
def compare(tmp_path):
    corpus = open_corpus(load_config("debug", [f"--runs={tmp_path}"])).path

    def compare(backend: str, *cases: tuple[str, ...]) -> None:
        cases = [(*case, f"--data.path={corpus}") for case in cases]
        results = run_ranks(train, 1, str(tmp_path), backend, *cases)[0]
        for case, plain, compiled in zip(cases, results[::2], results[1::2], strict=True):
            assert compiled["losses"] == pytest.approx(plain["losses"], rel=0, abs=BOUND), case
            before, after = compiled["graphs"]
            assert before == after and plain["graphs"] == [0, 0], f"{case}: compiled after the dry run"
            assert before >= 8, "plain, masked and two of evaluations, for two kinds of layers"

    return compare


def test_no_graph_is_left_for_the_first_step(compare):
    mixings = ("micro", "token")
    compare("aot_eager", *((f"--data.mixing={mixing}", "--data.micro_blocks=2", JOINT) for mixing in mixings))


def test_inductor(compare):
    compare("inductor", ("--train.steps=2",))


def test_an_error_comes_before_the_run(tmp_path):
    """On every rank, and before there is a run directory."""
    for message in run_ranks(refused, 2, str(tmp_path)):
        assert message.startswith("train.compile blocks: the kernel backend reference")
    assert not (tmp_path / "debug").exists()
