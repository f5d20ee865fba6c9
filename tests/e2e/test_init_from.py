"""A run that starts from a Hugging Face folder: the folder's weights in every ZeRO stage, and only at the start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from sgtm.config import Config, load_config

STILL = ["--optimizer.lr=1e-30", "--optimizer.warmup_steps=0", "--train.steps=1"]
CERTIFIED = [
    "--masking.joint=strict",
    "--optimizer.grad_clip_scope=owner",
    "--masking.certify=true",
    "--data.channel={}",
]
LONGER = ["--train.steps=4", "--train.checkpoint_every=2", "--distributed.zero_stage=3"]


def config(runs: str, name: str, *options: str) -> Config:
    return load_config("debug", [f"--runs={runs}", f"--name={name}", *options])


def evaluation(run: Path) -> dict:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return lines[-1]["losses"]["full"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    from sgtm.distributed.storage import stored_weights
    from sgtm.run.checkpoint import find_latest

    return dict(stored_weights(find_latest(run)))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def start_and_resume(runs: str, stages: tuple[int, ...]) -> dict:
    """Evaluation and weights of a run, of those that start from its export, and of one stopped and resumed."""
    from sgtm.distributed.on_ranks import on_rank_zero
    from sgtm.hf.export import export_run
    from sgtm.training.loop import train

    def results(*options: str, resume: bool = False) -> tuple[dict, dict]:
        """Evaluation and weights of a run, which rank 0 writes."""
        run = train(config(runs, *options), resume=resume)
        return on_rank_zero(lambda: (evaluation(run), weights(run)))

    folder = Path(runs, "folder")
    start = f"--train.init_from={folder}"
    record: dict = {"first": results("first")}
    on_rank_zero(lambda: export_run(Path(runs, "first"), [], folder))
    for stage in stages:
        options = (start, *STILL, f"--distributed.zero_stage={stage}")
        record[stage] = results(f"zero{stage}", *options)
        record[f"bf16, ZeRO {stage}"] = results(f"bf16-zero{stage}", *options, "--train.precision=bf16")
    try:
        results("certified", start, *CERTIFIED)
    except ValueError as error:
        record["certified"] = str(error)
    record["longer"] = results("longer", start, *LONGER)
    for gone in (Path(runs, "longer/checkpoints/step_00000004"), folder):
        on_rank_zero(lambda path=gone: shutil.rmtree(path))
    try:
        results("longer", f"--train.init_from={runs}/first", *LONGER, resume=True)
    except ValueError as error:
        record["refused"] = str(error)
    record["resumed"] = results("longer", start, *LONGER, resume=True)
    return record


CASES = {1: (0, 1, 2), 2: (3,)}  # ranks: ZeRO stages


@pytest.fixture(scope="module", params=CASES)
def outcomes(request, tmp_path_factory) -> dict:
    runs = str(tmp_path_factory.mktemp("runs"))
    return run_ranks(start_and_resume, request.param, runs, CASES[request.param])[0]


def test_it_starts_with_the_weights_of_the_folder_in_every_stage(outcomes):
    losses, first = outcomes["first"]
    for stage in outcomes.keys() & {0, 1, 2, 3}:
        again, started = outcomes[stage]
        assert again == pytest.approx(losses, rel=1e-6), f"ZeRO {stage}"
        assert started.keys() == first.keys()
        for name in first:
            torch.testing.assert_close(started[name], first[name], rtol=0, atol=1e-20)


def test_a_run_in_bf16_starts_with_the_fp32_weights(outcomes):
    """Not with those rounded to bf16, which the folder's are not."""
    first = outcomes["first"][1]
    assert not same(first, {name: tensor.bfloat16().float() for name, tensor in first.items()})
    cases = [name for name in outcomes if "bf16" in str(name)]
    assert cases
    for case in cases:
        for name, tensor in outcomes[case][1].items():
            torch.testing.assert_close(tensor, first[name], rtol=0, atol=1e-20, msg=f"{case}: {name}")


def test_an_export_that_has_learned_the_domain_is_no_start_of_a_certified_run(outcomes):
    assert "depends on the text of es: the run starts from an export that is not independent" in outcomes["certified"]


def test_a_resumed_run_goes_on_without_the_folder(outcomes):
    assert outcomes["resumed"][0] == outcomes["longer"][0]
    assert same(outcomes["resumed"][1], outcomes["longer"][1])
    assert "other settings" in outcomes["refused"] and "train.init_from: " in outcomes["refused"]


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(AssertionError, match=r"train\.init_from \S+nowhere: there is no such folder"):
        run_ranks(start_from_nowhere, 1, str(tmp_path))


def start_from_nowhere(runs: str) -> None:
    from sgtm.training.loop import train

    train(config(runs, "run", f"--train.init_from={runs}/nowhere"))
