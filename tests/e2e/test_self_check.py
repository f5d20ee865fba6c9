"""A broken kernel is caught before the first step: under `auto` the run trains on PyTorch, where it was named it ends.

Without a GPU `auto` is made to be `triton`, and copies of the modules of `torch` stand in for its kernels: Triton's
interpreter is slow (tests/kernels/test_selfcheck.py takes it).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks

from sgtm.config import load_config

SMALL = [
    "--train.precision=fp32",
    "--train.steps=2",
    "--train.eval_every=0",
    "--train.eval_sequences=1",
    "--train.tokens_per_step=32",
    "--model.layers=1",
    "--model.context=16",
]


def stand_ins(cache: str) -> None:
    """`triton` is what `auto` takes, and its ops are copies of those of `torch`."""
    import os
    from types import SimpleNamespace

    from sgtm_kernels import dispatch

    os.environ |= {"TRITON_INTERPRET": "1", "SGTM_CACHE": cache}
    for op in dispatch.OPS:
        dispatch._LOADED[op, "triton"] = SimpleNamespace(**vars(dispatch.pick(op, "torch")))
    own = dispatch.explain
    dispatch.explain = lambda name="auto", *rest: ("triton", "a GPU") if name == "auto" else own(name, *rest)


def break_kernel(op: str, function: str) -> None:
    """By a tenth."""
    from sgtm_kernels import dispatch

    kernel = dispatch.pick(op, "triton")
    inner = getattr(kernel, function)
    setattr(kernel, function, lambda *arguments, **options: 1.1 * inner(*arguments, **options))


def train_on_a_broken_kernel(folder: str) -> dict:
    """What two runs say, one by `auto` and one with `triton` named."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    from sgtm.distributed import self_check
    from sgtm.training.loop import train
    from sgtm_kernels import dispatch

    stand_ins(f"{folder}/cache")
    checks, check = [], self_check.check

    def counted(*arguments):
        checks.append(1)
        return check(*arguments)

    self_check.check, record = counted, {}
    break_kernel("mlp", "linear_gelu")
    named = load_config("debug", [*SMALL, f"--runs={folder}", "--name=named", "--kernels.backend=triton"])
    try:
        train(named)
    except ValueError as error:
        record["named"] = str(error), (Path(folder) / "named").exists()
    automatic = load_config("debug", [*SMALL, f"--runs={folder}", "--name=automatic"])
    with redirect_stdout(StringIO()) as printed, redirect_stderr(printed):
        run = train(automatic)
    record["printed"] = printed.getvalue()
    record["served"] = dispatch.pick("mlp", "triton") is dispatch.pick("mlp", "torch"), dispatch.served("triton")
    dispatch._FALLEN.clear()  # as in a new process
    with redirect_stdout(StringIO()) as printed, redirect_stderr(printed):
        train(automatic, resume=True)
    record["resumed"] = printed.getvalue()
    record["lines"] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    record["kept"] = self_check.self_check(automatic, "triton"), len(checks)  # passes now, with the op of PyTorch
    record["again"] = self_check.self_check(automatic, "triton"), len(checks)
    other = automatic.model_copy(update={"masking": automatic.masking.model_copy(update={"strategy": "none"})})
    other.__dict__.pop("tables")
    record["other masks"] = self_check.self_check(other, "triton"), len(checks)
    return record


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_ranks(train_on_a_broken_kernel, 1, str(tmp_path_factory.mktemp("runs")))[0]


def test_a_named_backend_ends_with_the_name_of_the_op(outcomes):
    message, made = outcomes["named"]
    assert message.startswith("kernel backend 'triton' was requested, but on this device it fails its self-check:")
    assert "\n  mlp.linear_gelu: output 0 is off by" in message and message.count("\n") == 2 and not made


def test_auto_trains_on_without_the_broken_kernel(outcomes):
    assert outcomes["served"] == (True, "triton (mlp by torch)")
    for printed in ("printed", "resumed"):
        assert " ".join(outcomes[printed].split()).count("warning: mlp.linear_gelu: output 0 is off by") == 1
    assert "is complete" in " ".join(outcomes["resumed"].split())
    assert [line["step"] for line in outcomes["lines"] if line["kind"] == "step"]


def test_what_has_passed_is_not_checked_again(outcomes):
    for name in ("kept", "again"):
        assert outcomes[name][0] == dict.fromkeys(outcomes[name][0]) and "mlp" in outcomes[name][0]
    assert [outcomes[name][1] for name in ("kept", "again", "other masks")] == [4, 4, 5]


def check_where_one_rank_is_broken(folder: str) -> tuple[str, list[str], str]:
    """The error of the named backend, the warnings of `auto`, and what serves then."""
    from sgtm.distributed.process_group import init_distributed
    from sgtm.distributed.self_check import check_kernels
    from sgtm_kernels import dispatch

    automatic = load_config("debug", SMALL)
    rank = init_distributed(automatic.distributed, automatic.kernels).rank
    stand_ins(f"{folder}/{rank}")
    if rank:
        break_kernel("mlp", "linear_gelu")
        break_kernel("embedding", "embedding")
    with pytest.raises(ValueError, match="was requested") as error:
        check_kernels(load_config("debug", [*SMALL, "--kernels.backend=triton"]))
    return str(error.value), check_kernels(automatic), dispatch.served("triton")


def test_kernels_that_are_broken_on_one_rank_are_replaced_on_all(tmp_path):
    ranks = run_ranks(check_where_one_rank_is_broken, 2, str(tmp_path))
    assert ranks[0] == ranks[1]
    error, warnings, served = ranks[0]
    broken = sorted(["mlp.linear_gelu", "embedding.embedding"])
    assert all(f"\n  {name}: output 0 is off by" in error for name in broken)
    assert sorted(warning.split(": ")[1] for warning in warnings) == broken
    assert served in ("triton (mlp, embedding by torch)", "triton (embedding, mlp by torch)")
