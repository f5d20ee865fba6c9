"""Whole runs: the paper's 25/75 makes the residual stream grow and warns once; unmasked and `dual` runs do not.

All have the same learning rate, so the difference is what the warning names as the cause. The stream grew to 7.4, 4.3
and 4.8 times its early norm. At a learning rate of 0.05 all three warn.
"""

from __future__ import annotations

from ranks import run_ranks

from sgtm.config import load_config
from sgtm.run.metrics import read_metrics
from sgtm.run.residual import DUAL

STEPS = 20
OPTIONS = (
    f"--train.steps={STEPS}",
    "--optimizer.warmup_steps=4",
    "--train.tokens_per_step=1024",
    "--train.log_every=2",
    "--train.eval_sequences=4",
    "--optimizer.lr=0.02",
)


def train(runs: str, cases: dict[str, tuple[str, ...]]) -> dict[str, list[dict]]:
    """Lines of the log of each run."""
    from sgtm.training import loop

    logs = {}
    for name, options in cases.items():
        run = loop.train(load_config("debug", [*OPTIONS, *options, f"--runs={runs}", f"--name={name}"]))
        logs[name] = read_metrics(run / "metrics.jsonl")
    return logs


def test_the_papers_recipe_warns_where_unmasked_and_dual_do_not(tmp_path):
    paper = {"retain": {"retain": 0.25, "unlabeled": 0.75}}
    assert load_config("debug").data.channel == paper
    cases = {"paper": (), "unmasked": ("--masking.strategy=none",), "dual": ("--recipe=dual",)}
    (lines,) = run_ranks(train, 1, str(tmp_path), cases)
    for name, of_run in lines.items():
        steps = [line for line in of_run if line["kind"] == "step"]
        assert [line["step"] for line in steps] == list(range(2, STEPS + 1, 2))
        for line in steps:
            assert {f"loss/{label}" for label in line["norms"]} <= line.keys()
            assert all(len(parts["residual"]) == 3 for parts in line["norms"].values())
        (evaluation,) = [line for line in of_run if line["kind"] == "eval"]
        removals = ["full"] if name == "unmasked" else ["full", "without es"]
        assert {removal: set(by) for removal, by in evaluation["norms"].items()} == {
            removal: {"en", "es"} for removal in removals
        }
        warnings = [line["text"] for line in of_run if line["kind"] == "warning"]
        assert len(warnings) == (name == "paper")
        assert all("unlabeled tokens train the retain group" in text and DUAL in text for text in warnings)
