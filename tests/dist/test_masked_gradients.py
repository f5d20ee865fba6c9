"""The examples of docs/masked-gradients.md in two ranks, and what it says of hooks and `.grad`.

Of sgtm/integrations/range_adamw.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

PAGE = (Path(__file__).parents[2] / "docs" / "masked-gradients.md").read_text("utf-8")
SETUP, PLAIN, FSDP2, ZERO = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
BOTH = ("0.weight", "1.weight")


def run(*blocks: str) -> dict:
    """Names that the blocks define."""
    scope: dict = {}
    for block in blocks:
        exec(block.replace('"cuda"', '"cpu"'), scope)
    return scope


def start() -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run(SETUP)["model"].named_parameters()}


def plain() -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run(SETUP, PLAIN)["model"].named_parameters()}


def frozen_in(weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The frozen parts of both matrices, and the others."""
    rows, columns = (weights[name] for name in BOTH)
    frozen = torch.cat([rows[:40].flatten(), columns[:, [0, 1, 2, 6, 7]].flatten()])
    return frozen, torch.cat([rows[40:].flatten(), columns[:, 3:6].flatten()])


def under_fsdp2() -> tuple[dict, dict]:
    scope = run(SETUP, FSDP2)
    states = {name: scope["optimizer"].state[p]["exp_avg_sq"].full_tensor() for name, p in named(scope)}
    return {name: p.full_tensor().detach() for name, p in named(scope)}, states


def named(scope: dict) -> list:
    return list(scope["model"].named_parameters())


def under_zero(stage: int) -> tuple[dict, dict]:
    import deepspeed

    scope = run(SETUP, ZERO.replace('"stage": 3', f'"stage": {stage}'))
    with deepspeed.zero.GatheredParameters(list(scope["model"].parameters()), enabled=stage == 3):
        return {name: p.detach().clone() for name, p in named(scope)}, {}


@pytest.mark.parametrize("trainer", ["fsdp2", 0, 1, 2, 3])
def test_an_example_trains_as_one_process_and_freezes(trainer):
    before, expected = start(), plain()
    ranks = run_ranks(under_fsdp2, 2) if trainer == "fsdp2" else run_ranks(under_zero, 2, trainer)
    for after, seconds in ranks:
        (old, others), (new, moved) = frozen_in(before), frozen_in(after)
        assert torch.equal(old, new) and (others != moved).all()
        for name, weight in expected.items():
            assert torch.allclose(after[name], weight, atol=1e-6, rtol=0), name
        if seconds:
            silent, live = frozen_in(seconds)
            assert not silent.any() and live.any()


def test_the_plain_example_freezes():
    (old, others), (new, moved) = frozen_in(start()), frozen_in(plain())
    assert torch.equal(old, new) and (others != moved).all()


def hooks_under_fsdp2() -> tuple[list[str], tuple[int, ...]]:
    """Which hooks on a sharded parameter run, and the shape of the gradient that this rank has then."""
    calls: list[str] = []
    scope = run(SETUP, FSDP2.partition("optimizer =")[0])
    weight = scope["model"][0].weight
    weight.register_hook(lambda grad: calls.append("hook"))
    weight.register_post_accumulate_grad_hook(lambda parameter: calls.append("post-accumulate"))
    scope["model"](scope["batches"][0]).mean().backward()
    return calls, tuple(weight.grad.to_local().shape)


def gradient_under_zero3() -> tuple[list[int], bool]:
    """Shape of a parameter after the backward pass, and whether it has a gradient."""
    small = '"stage": 3, "stage3_param_persistence_threshold": 0'
    scope = run(SETUP, ZERO.partition("for ids")[0].replace('"stage": 3', small))
    scope["engine"].backward(scope["engine"](scope["batches"][0]).mean())
    weight = scope["model"][0].weight
    return list(weight.shape), weight.grad is not None


def test_a_hook_on_a_sharded_parameter_never_runs():
    assert run_ranks(hooks_under_fsdp2, 2) == [(["post-accumulate"], (24, 8)), (["post-accumulate"], (23, 8))]


def test_zero_3_leaves_no_gradient_to_edit():
    assert run_ranks(gradient_under_zero3, 2) == [([0], False)] * 2


def without_bind() -> str:
    scope = run(SETUP, ZERO.partition("optimizer.bind")[0])
    engine = scope["engine"]
    engine.backward(engine(scope["batches"][0]).mean())
    try:
        engine.step()
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_step_without_bind_is_an_error():
    assert all("call bind(engine.optimizer)" in message for message in run_ranks(without_bind, 2))


def resumed(folder: str, stage: int) -> list[dict]:
    """Weights after the steps of the page, twice: in one go, and from a checkpoint after the first."""
    import deepspeed

    results = []
    for begin in (0, 1):
        scope = run(SETUP, ZERO.partition("for ids")[0].replace('"stage": 3', f'"stage": {stage}'))
        engine = scope["engine"]
        if begin:
            engine.load_checkpoint(folder)
        for number, ids in enumerate(scope["batches"][begin:], begin):
            engine.backward(engine(ids).square().mean())
            engine.step()
            if number == 0:
                engine.save_checkpoint(folder)
        with deepspeed.zero.GatheredParameters(list(scope["model"].parameters()), enabled=stage == 3):
            results.append({name: p.detach().clone() for name, p in named(scope)})
    return results


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_deepspeed_resumes_to_the_bit(tmp_path, stage):
    for straight, again in run_ranks(resumed, 2, str(tmp_path), stage):
        assert all(torch.equal(weight, again[name]) for name, weight in straight.items())
