"""Whole runs: a residual stream that is made to grow raises its warning once, a healthy one does not.

Faults tried, each seen to fail: norms not measured in the steps that are logged; the warning raised for both.
"""

from __future__ import annotations

from sgtm.config import load_config
from sgtm.distributed.testing import run_ranks
from sgtm.train.metrics import read_metrics

STEPS = 10
OPTIONS = (
    f"--train.steps={STEPS}",
    "--optimizer.warmup_steps=4",
    "--train.tokens_per_step=1024",
    "--train.log_every=2",
)


def train(runs: str, cases: dict[str, tuple[str, ...]]) -> dict[str, list[dict]]:
    """Lines of the log of each run."""
    from sgtm.train import loop

    found = {}
    for name, options in cases.items():
        run = loop.train(load_config("debug", [*OPTIONS, *options, f"--runs={runs}", f"--name={name}"]))
        found[name] = read_metrics(run / "metrics.jsonl")
    return found


def test_a_growing_stream_warns_and_a_healthy_one_does_not(tmp_path):
    cases = {"healthy": ("--optimizer.lr=0.001",), "growing": ("--optimizer.lr=0.05",)}
    (lines,) = run_ranks(train, 1, str(tmp_path), cases)
    for name, of_run in lines.items():
        steps = [line for line in of_run if line["kind"] == "step"]
        assert [line["step"] for line in steps] == list(range(2, STEPS + 1, 2))
        for line in steps:
            assert {f"loss/{label}" for label in line["norms"]} <= line.keys()
            assert all(len(parts["residual"]) == 3 for parts in line["norms"].values())
        (evaluation,) = [line for line in of_run if line["kind"] == "eval"]
        assert {removal: set(by) for removal, by in evaluation["norms"].items()} == {
            "full": {"en", "es"},
            "without es": {"en", "es"},
        }
        warnings = [line["text"] for line in of_run if line["kind"] == "warning"]
        assert len(warnings) == (name == "growing")
        assert all("unlabeled tokens train the retain group" in text for text in warnings)
