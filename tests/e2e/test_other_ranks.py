"""A run begun on four ranks goes on upon two, in another ZeRO stage, and ends on one as if nothing had changed.

Losses stay within the bounds of test_same_losses.py, and every global step has the sequences that it has in a run on
one rank.
"""

from __future__ import annotations

from pathlib import Path

from e2e.test_same_losses import BOUND, OVERRIDES, STEPS, largest_difference
from ranks import run_ranks

from sgtm.config import load_config
from sgtm.config.load import load_run_config
from sgtm.data.open import open_corpus
from sgtm.run.metrics import read_metrics

DERIVED = ["--train.micro_batch=null"]  # another number of sequences on other ranks
PARTS = [(4, 3, 7), (2, 1, 13), (1, 1, STEPS)]  # ranks, ZeRO stage, last step


def train_until(runs: str, corpus: str, stage: int, last: int) -> dict[int, list[list[int]]]:
    """Go on with the run of each precision to this step; the rows of tokens that this rank has read, by step."""
    from sgtm.training import loop

    seen: dict[int, list[list[int]]] = {}

    class Seen(loop.Loader):
        def step(self, number: int):
            batches = super().step(number)
            seen[number] = [row for batch in batches for row in batch.input_ids.tolist()]
            return batches

    class Stop(loop.StopSignal):
        def anywhere(self, engine) -> bool:
            return last - 1 in seen and last < STEPS

    loop.Loader, loop.StopSignal = Seen, Stop
    for precision in BOUND:
        seen.clear()
        options = [*OVERRIDES, f"--train.precision={precision}", f"--distributed.zero_stage={stage}"]
        where = [f"--data.path={corpus}", f"--runs={runs}", f"--name={precision}"]
        loop.train(load_config("debug", [*options, "--train.log_every=2", *DERIVED, *where]), resume=True)
    return seen


def of_steps(of_ranks: list[dict[int, list[list[int]]]]) -> dict[int, list[list[int]]]:
    """The rows of every global step, from those of all ranks."""
    return {step: sorted(row for rank in of_ranks for row in rank[step]) for step in of_ranks[0]}


def test_four_ranks_then_two_then_one(tmp_path: Path):
    corpus = str(open_corpus(load_config("debug", [f"--runs={tmp_path}"])).path)
    whole = of_steps(run_ranks(train_until, 1, str(tmp_path / "whole"), corpus, 1, STEPS))
    read: dict[int, list[list[int]]] = {}
    for ranks, stage, last in PARTS:
        part = of_steps(run_ranks(train_until, ranks, str(tmp_path / "parts"), corpus, stage, last))
        assert not part.keys() & read.keys(), "no step is trained twice"
        read |= part
    assert read == whole and len({str(rows) for rows in whole.values()}) == STEPS
    for precision, bound in BOUND.items():
        assert load_run_config(tmp_path / "parts" / precision).train.micro_batch is None
        curves = []
        for runs in ("parts", "whole"):
            lines = [line for line in read_metrics(tmp_path / runs / precision / "metrics.jsonl") if "loss" in line]
            curves.append([{k: v for k, v in line.items() if k == "step" or k.startswith("loss")} for line in lines])
        assert largest_difference(*curves) <= bound, precision
