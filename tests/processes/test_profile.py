"""`sgtm profile`, run for real on the debug preset, and what it makes of the trace of a GPU."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import build, mixed_records
from ranks import run_ranks
from rich.console import Console
from tiny import MIXED, tiny_config, tiny_model, tiny_step

from sgtm.commands.main import main
from sgtm.config import load_config
from sgtm.data.random_data import RandomCorpus
from sgtm.measure.nsight import find_kernel, function_name, nsight_command
from sgtm.measure.profile import WARM_UP, corpus_of, first_steps, print_profile
from sgtm.measure.ranges import MODULES, PHASES, name_modules
from sgtm.measure.trace import summarize

LAYERS, MICRO_BATCHES, STEPS = 2, 4, 2
RANGES = {*PHASES, *MODULES, *(f"{module} backward" for module in MODULES)}
LATER = ["--model.activation_checkpointing=true", "--distributed.zero_stage=3", "--data.mixing=token"]


def take(folder: str) -> list[tuple[int, str, str]]:
    """What the commands say, in a process of their own."""
    os.environ["COLUMNS"] = "80"
    os.chdir(folder)
    kernel = ["--kernel", "norm_forward"]
    calls = [called("profile", "debug", "--steps", str(STEPS), "--train.log_every", "3", *kernel)]
    calls.append(called("profile", "debug", "--steps", "1", "--out", "deep/er", *LATER))
    again = shlex.split(calls[0][1].splitlines()[-1])
    few = ["--train.tokens_per_step", "64", "--train.micro_batch", "1"]  # Triton's interpreter is slow
    calls.append(called(*again[again.index("sgtm") + 1 :], *few, "--out", "none"))
    return calls


def called(*arguments: str) -> tuple[int, str, str]:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = main(list(arguments))
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("profile")


@pytest.fixture(scope="module")
def outputs(folder) -> list[tuple[int, str, str]]:
    calls = run_ranks(take, 1, str(folder))[0]
    assert [(status, err) for status, _, err in calls] == [(0, "")] * 3
    return calls


def events_of(file: Path) -> list[dict]:
    return json.loads(file.read_text())["traceEvents"]


def ranges_of(file: Path) -> dict[str, list[dict]]:
    ranges = [e for e in events_of(file) if e.get("cat") == "user_annotation" and e["name"] in RANGES]
    return {name: [e for e in ranges if e["name"] == name] for name in RANGES}


def test_the_trace_has_every_range_of_the_profiled_steps(outputs, folder):
    ranges = ranges_of(folder / "runs/debug-profile/trace.json")
    steps = {e["name"] for e in events_of(folder / "runs/debug-profile/trace.json") if "ProfilerStep#" in e["name"]}
    assert steps == {f"ProfilerStep#{WARM_UP + step}" for step in range(STEPS)}
    passes = MICRO_BATCHES * STEPS
    counts = {name: len(events) for name, events in ranges.items() if " " not in name}
    each = {"embedding": 1, "norm": 2 * LAYERS + 1, "attention": LAYERS, "mlp": LAYERS, "loss": 1}
    once = {"forward": passes, "backward": passes, "optimizer": STEPS}
    assert counts == once | {name: n * passes for name, n in each.items()}
    for name, events in ranges.items():
        if name in PHASES:
            continue
        phase = ranges["backward" if name.endswith(" backward") else "forward"]
        assert events
        for event in events:
            assert any(p["ts"] <= event["ts"] <= event["ts"] + event["dur"] <= p["ts"] + p["dur"] for p in phase)


def test_what_checkpointed_blocks_recompute_is_in_the_backward_pass(outputs, folder):
    ranges = ranges_of(folder / "deep/er/trace.json")
    assert len(ranges["attention"]) == 2 * LAYERS * MICRO_BATCHES and len(ranges["loss"]) == MICRO_BATCHES
    assert all(ranges.values())


@pytest.mark.parametrize("where", ["runs/debug-profile", "deep/er"])
def test_the_shares_add_up(outputs, folder, where):
    summary = json.loads((folder / where / "summary.json").read_text())
    for table in ("kernels", "ranges"):
        rows = summary[table]
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert sum(row["ms_per_step"] for row in rows) == pytest.approx(summary["kernel_ms_per_step"])
        assert all(0 <= row["share"] <= 1 for row in rows)
    assert 0 < summary["kernel_ms_per_step"] < summary["ms_per_step"] and summary["data"] == "random tokens"
    pairs = {(row["phase"], row["module"]) for row in summary["ranges"]}
    assert {(phase, module) for phase in ("forward", "backward") for module in MODULES} <= pairs
    assert ("optimizer", "other") in pairs
    calls = {row["name"]: row["calls_per_step"] for row in summary["kernels"]}
    assert calls["linear.pytorchBackward"] == 3 * LAYERS * MICRO_BATCHES  # the fourth is one with its GELU


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_are_whole(outputs, folder, width):
    summary = json.loads((folder / "runs/debug-profile/summary.json").read_text())
    console = Console(width=width, file=io.StringIO(), record=True)
    print_profile(summary, Path("out"), console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    for module in (*MODULES, "other"):
        rows = [row for row in summary["ranges"] if row["module"] == module]
        assert lines[module][-2] == f"{sum(row['ms_per_step'] for row in rows):,.2f}"
        assert lines[module][-1] == f"{sum(row['share'] for row in rows):.1%}"
    assert lines["total"][-1] == "100.0%"
    ends = [line.split()[-2:] for line in text.splitlines()]
    assert all([f"{row['ms_per_step']:,.3f}", f"{row['share']:.1%}"] in ends for row in summary["kernels"][:15])


def test_the_command_of_nsight_compute_takes_the_same_steps_by_itself(outputs, folder):
    *_, note, line = outputs[0][1].splitlines()
    assert note == (
        "Nsight Compute of norm_forward, with --kernels.backend triton, as torch does not launch it; of its first "
        "launch:"
    )
    command = shlex.split(line)
    where = command.index(sys.executable)
    assert shlex.join(command[:where]) == (
        "ncu --kernel-name 'regex:^norm_forward$' --launch-skip 0 --launch-count 1 --set full --force-overwrite "
        "-o runs/debug-profile/norm_forward"
    )
    arguments = "-m sgtm profile debug --train.log_every 3 --steps 1 --no-trace --kernels.backend triton"
    assert command[where + 1 :] == shlex.split(arguments)
    assert re.fullmatch(r"debug: 1 step of [\d,.]+ ms; no trace was written\n", outputs[2][1])
    assert not (folder / "none").exists()


def test_kernels_are_named_as_nsight_compute_filters_them():
    assert [function_name(name) for name in KERNELS] == ["vectorized_kernel", "mul", "sm90_gemm", "norm_forward"]
    assert find_kernel(KERNELS[0], KERNELS) == find_kernel("vectorized_kernel", KERNELS) == "vectorized_kernel"
    assert find_kernel("attention_forward", ()) == "attention_forward"
    with pytest.raises(ValueError, match=r"--kernel nrom: no such kernel; Triton kernels: .*norm_forward.*: mul, "):
        find_kernel("nrom", KERNELS)
    assert "'regex:^a\\+b$'" in nsight_command("a+b", [], 7, "x") and "--launch-skip 7" in nsight_command(
        "a", [], 7, "x"
    )


KERNELS = (
    "void at::native::(anonymous namespace)::vectorized_kernel<4, at::Add<float> >(int, at::Add<float>)",
    "at::mul(float*)",
    "sm90_gemm",
    "norm_forward",
)


def test_an_op_of_the_cpu_is_no_kernel(capsys, monkeypatch):
    monkeypatch.setattr("sgtm.measure.profile.init_distributed", lambda *args: None)
    assert main(["profile", "debug", "--kernel", "aten::mm"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --kernel aten::mm: no such kernel; Triton kernels: activation_backward, ")
    assert message.endswith("kernels of this trace: none, there is no GPU\n")


def event(cat: str, name: str, start: float, end: float, tid: int = 1, correlation: int | None = None) -> dict:
    times = {"ph": "X", "pid": 1, "tid": tid, "ts": start, "dur": end - start}
    return {"cat": cat, "name": name, "args": {"correlation": correlation}, **times}


def test_kernels_of_a_gpu_belong_to_the_ranges_of_their_launch():
    """The backward pass has a thread of its own, and a kernel runs long after its launch."""
    mark = "user_annotation"
    events = [
        event(mark, "forward", 0, 50), event(mark, "mlp", 10, 40), event("cpu_op", "aten::mm", 11, 39),
        event("cuda_runtime", "cudaLaunchKernel", 20, 21, correlation=1),
        event("cuda_runtime", "cudaLaunchKernel", 45, 46, correlation=2),
        event(mark, "backward", 60, 90), event(mark, "mlp backward", 65, 70, tid=2),
        event(mark, "strange", 66, 69, tid=2),
        event("cuda_driver", "cuLaunchKernelEx", 67, 68, tid=2, correlation=3),
        event(mark, "optimizer", 91, 99), event("cuda_runtime", "cudaMemsetAsync", 92, 93, correlation=4),
        event("kernel", "gemm", 100, 140, 7, 1), event("kernel", "add", 140, 150, 7, 2),
        event("kernel", "gemm", 150, 180, 7, 3), event("gpu_memset", "Memset", 180, 190, 7, 4),
        event("kernel", "add", 190, 200, 7, 5), {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    summary = summarize(events, steps=2, seconds=0.001, on_gpu=True)
    assert {(r["phase"], r["module"]): round(r["share"], 9) for r in summary["ranges"]} == {
        ("forward", "mlp"): 0.4, ("forward", "other"): 0.1, ("backward", "mlp"): 0.3, ("optimizer", "other"): 0.1,
        ("other", "other"): 0.1,
    }  # fmt: skip
    assert [(r["name"], r["calls_per_step"], r["ms_per_step"]) for r in summary["kernels"]] == [
        ("gemm", 1, 0.035), ("add", 1, 0.01), ("Memset", 0.5, 0.005),
    ]  # fmt: skip
    assert (summary["ms_per_step"], summary["kernel_ms_per_step"]) == (0.5, 0.05)
    with pytest.raises(ValueError, match="the profiler does not see this GPU"):
        summarize(events[:4], 2, 0.001, on_gpu=True)


def test_ops_of_a_cpu_count_without_what_they_call():
    events = [
        event("user_annotation", "forward", 0, 100), event("cpu_op", "outer", 10, 60),
        event("user_annotation", "mlp backward", 15, 55), event("user_annotation", "norm", 20, 50),
        event("cpu_op", "inner", 20, 40), event("cpu_op", "leaf", 25, 30), event("cpu_op", "leaf", 60, 70),
        event("cpu_op", "leaf", 62, 66, tid=2),
    ]  # fmt: skip
    summary = summarize(events, 1, 0.0001, on_gpu=False)
    assert {r["name"]: r["ms_per_step"] for r in summary["kernels"]} == {"outer": 0.03, "inner": 0.015, "leaf": 0.019}
    assert {(r["phase"], r["module"]): r["ms_per_step"] for r in summary["ranges"]} == {
        ("forward", "norm"): 0.02, ("forward", "other"): pytest.approx(0.044),
    }  # fmt: skip


def test_named_modules_compute_the_same():
    config = tiny_config()
    gradients = []
    for named in (False, True):
        model = tiny_model(config)
        if named:
            name_modules(model)
        for batch in tiny_step(config, 0, MIXED, 0, 1):
            model(*batch)[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_random_tokens_are_labelled_and_mixed_as_the_config_says(tmp_path):
    config = load_config("debug", ["--masking.domains=[a, b]", f"--runs={tmp_path}", "--data.upsample.en=2"])
    corpus = corpus_of(config)
    assert isinstance(corpus, RandomCorpus)
    steps = first_steps(corpus, config, 0, 1, 50)
    tokens = np.zeros(4)
    for batch in (batch for batches in steps for batch in batches):
        np.add.at(tokens, list(batch.labels), batch.lengths)
    assert tokens.sum() == 50 * 512 and tokens / tokens.sum() == pytest.approx([1 / 4, 1 / 12, 1 / 3, 1 / 3], abs=0.05)
    for mixing in ("step", "micro", "token"):
        mixed = config.model_copy(update={"data": config.data.model_copy(update={"mixing": mixing})})
        for batches in first_steps(corpus, mixed, 0, 1, WARM_UP):
            pure = [len(set(batch.labels)) == 1 for batch in batches]
            assert all(pure) == (mixing != "token") and (len(batches[0].step_labels) == 1) == (mixing == "step")


def test_prepared_data_are_used(tmp_path):
    corpus = build(tmp_path / "mine", mixed_records())
    config = load_config("debug", [f"--data.path={tmp_path / 'mine'}", "--model.vocab_size=257"])
    assert corpus_of(config).fingerprint == corpus.fingerprint
    (tmp_path / "mine" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is not finished"):
        corpus_of(config)
