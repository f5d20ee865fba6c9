"""What only a whole `train` can break: the freeze it asks for, the dry run, the backend it was told to use."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

from sgtm.config import load_config

OVERRIDES = [
    "--data.mixing=step",
    "--masking.joint=masked",
    "--train.steps=12",
    "--kernels.backend=reference",
    "--distributed.zero_stage=2",
]


def train_and_watch(runs: str) -> dict:
    """Counts of updates by key, what they should be, and whether the dry run changed a bit; on every rank."""
    from sgtm.data.loader import Loader
    from sgtm.data.open import open_corpus
    from sgtm.model.rows import live_keys
    from sgtm.training import loop

    seen: dict = {}

    def state(engine) -> list[torch.Tensor]:
        tensors = [p.detach().clone() for p in engine.module.parameters()]
        for values in engine.optimizer.state.values():
            tensors += [values["exp_avg"].clone(), values["exp_avg_sq"].clone()]
        return tensors

    def watched_dry_run(engine, tables):
        seen["engine"], before = engine, state(engine)
        inner(engine, tables)
        seen["untouched"] = all(torch.equal(a, b) for a, b in zip(before, state(engine), strict=True))
        seen["counts after the dry run"] = set(engine.optimizer.steps.values())

    inner, loop.dry_run = loop.dry_run, watched_dry_run
    config = load_config("debug", [*OVERRIDES, f"--runs={runs}"])
    loop.train(config)
    engine = seen.pop("engine")
    loader = Loader(open_corpus(config), config)
    labels = [loader.step_labels(step) for step in range(config.train.steps)]
    live = [live_keys(config.tables, step_labels) for step_labels in labels]
    expected = {key: sum(key in keys for keys in live) for key in engine.optimizer.steps}
    return {**seen, "found": dict(engine.optimizer.steps), "expected": expected, "backend": engine.module.backend}


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    return run_ranks(train_and_watch, 2, str(tmp_path_factory.mktemp("runs")))


def test_what_a_step_may_not_update_is_frozen(watched):
    for rank in watched:
        assert rank["found"] == rank["expected"]
        assert 0 < rank["found"]["mlp_in.retain"] < 12, "some steps must freeze the retain group, and some not"
        assert 0 < rank["found"]["norm"] < 12


def test_the_dry_run_changes_nothing(watched):
    for rank in watched:
        assert rank["untouched"]
        assert rank["counts after the dry run"] == {0}


def test_a_named_backend_is_the_one_that_runs(watched):
    assert [rank["backend"] for rank in watched] == ["reference", "reference"]
