"""Whether two runs have gone the same way, bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
from waiting import wait_until

from sgtm.distributed.storage import STATE_TENSORS, Stored
from sgtm.run.checkpoint import find_latest, read_manifest
from sgtm.run.metrics import read_metrics


def wait_for_step(run: Path, step: int) -> None:
    wait_until(lambda: any(line["step"] >= step for line in read_metrics(run / "metrics.jsonl")))


def metrics(run: Path) -> list[dict]:
    """Lines of metrics.jsonl without what depends on the clock; where checkpoints lie depends on the kill."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] != "checkpoint"]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def assert_same_run(run: Path, other: Path) -> None:
    """The same end: weights, buffers, moments, step counts, losses and evaluations; files of the same content."""
    assert metrics(run) == metrics(other), "metrics.jsonl differs"
    ours, theirs = (Stored(find_latest(path)) for path in (run, other))
    assert ours.client["state"]["step"] == theirs.client["state"]["step"], "another last step"
    assert ours.client["optimizer_steps"] == theirs.client["optimizer_steps"], "the optimizer's step counts differ"
    assert ours.shapes == theirs.shapes and ours.buffers.keys() == theirs.buffers.keys(), "another model"
    for name in theirs.shapes:
        for part in STATE_TENSORS:
            assert torch.equal(ours.read(name, part), theirs.read(name, part)), f"{part} of {name} differs"
    for name, buffer in theirs.buffers.items():
        assert torch.equal(ours.buffers[name], buffer), f"{name} differs"
    assert theirs.model["global_steps"] == theirs.client["state"]["step"], "DeepSpeed's count is another"
    assert read_manifest(find_latest(run))["files"] == read_manifest(find_latest(other))["files"], "the files differ"
