"""Stages of benchmarks/gpu.py by themselves: what counts as an error, what is compiled, busy time, what is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from bare import ROOT, python_path

from sgtm_kernels.dispatch import OPS
from sgtm_kernels.tools.shapes import SHAPES, plans


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    for folder in ("benchmarks", "benchmarks/gpu_stages"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def test_an_error_has_the_budget_of_plain_torch_and_zeros_stay_zeros():
    from smoke import FACTOR, compared

    exact = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    plain = exact.float() + torch.tensor([[0.1, 0.0], [0.0, 0.0]])
    actual = exact.float() + torch.tensor([[0.0, 0.39], [0.0, 0.0]])
    assert FACTOR == 4 and compared(actual, plain, exact)["ok"]
    verdict = compared(exact.float() + torch.tensor([[0.0, 0.41], [0.0, 0.0]]), plain, exact)
    assert not verdict["ok"] and verdict["error"] > verdict["budget"]
    unwritten = exact.float() + torch.tensor([[0.0, torch.nan], [0.0, 0.0]])
    assert not compared(unwritten, plain, exact)["ok"]
    touched = compared(exact.float() + torch.tensor([[0.0, 0.0], [1e-6, 0.0]]), plain, exact)
    assert not touched["ok"] and touched["rows_not_zero"] == 1
    assert compared(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]).double())["ok"]
    assert compared(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0).double())["ok"]


@pytest.mark.parametrize("fault", [None, "wrong", "unwritten", "interference"])
def test_smoke_finds_what_an_op_gets_wrong(fault, monkeypatch):
    """Embedding's backward pass: twice the gradient, a row that was not written, a row that forget tokens reach."""
    from op_cases import CASES, Inputs
    from smoke import check

    torch.manual_seed(0)
    shape = SHAPES["tiny"]
    case = CASES["embedding"]["embedding"](shape, Inputs(torch.device("cpu"), torch.bfloat16))
    results = case.results

    def broken(plan, backend, dtype):
        outputs = results(plan, backend, dtype)
        if backend == "torch":
            dw = outputs["dweight"]
            untouched = int((dw == 0).all(1).nonzero()[0])
            if fault == "wrong":
                dw *= 2
            elif fault == "unwritten":
                dw[3] = torch.empty_like(dw[3]).fill_(torch.nan)
            elif fault == "interference":
                dw[untouched, 0] = 1e-30
        return outputs

    case = type(case)(case.ours, case.public, case.work, broken)
    row = check(case, plans(shape)["25 % forget"], "torch", torch.bfloat16, {})
    assert row["outcome"] == ("failed" if fault else "ok") and row["results"]["out"]["ok"]
    assert ("dweight" in row.get("error", "")) == bool(fault)


WARM = """
import json, os, torch
import warm
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from sgtm_kernels.tools.shapes import SHAPES
from op_cases import CASES, Inputs

driver.set_active(warm.NoDevice())
target = driver.active.get_current_target()
launches = warm.launches_of("mlp", [SHAPES["tiny"]], torch.device("cpu"))
problems = [warm.compile_one(launch, target)[1] for launch in launches]
cached = set(os.listdir(os.environ["TRITON_CACHE_DIR"]))
# The calls themselves, made as they are made on a GPU but for the launch: they compile nothing more.
run = JITFunction.run
JITFunction.run = lambda self, *args, grid, warmup, **kw: run(self, *args, grid=grid, warmup=True, **kw)
for build in CASES["mlp"].values():
    case = build(SHAPES["tiny"], Inputs(torch.device("cpu"), torch.bfloat16))
    for mask in warm.MASKS:
        case.ours(warm.plans(SHAPES["tiny"])[mask], "triton")()
new = set(os.listdir(os.environ["TRITON_CACHE_DIR"])) - cached
names = sorted({launch.kernel for launch in launches})
print(json.dumps({"names": names, "launches": len(launches), "problems": problems, "new": len(new)}))
"""


def test_what_is_compiled_beforehand_is_what_calls_launch(tmp_path):
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    environ["PYTHONPATH"] = python_path(*(ROOT / f for f in ("benchmarks", "benchmarks/gpu_stages", "kernels")))
    done = subprocess.run([sys.executable, "-c", WARM], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)
    assert output["names"] == ["activation_backward", "activation_forward", "add_partial_sums"]
    assert output["launches"] >= 6 and output["problems"] == [None] * output["launches"] and output["new"] == 0


def test_busy_share_and_gaps_of_a_profile():
    from profile_step import Span, summary

    spans = [Span("a", 0, 10), Span("b", 5, 8), Span("a", 20, 30), Span("c", 29, 40)]
    profile = summary(spans, steps=2)
    assert profile["busy_share"] == 0.75 and profile["milliseconds"] == 0.02 and profile["launches"] == 2
    assert profile["gaps"] == [{"ms": 0.01, "after": "a", "before": "a"}]
    assert [(k["name"], k["ms"], k["calls"]) for k in profile["kernels"]] == [
        ("a", 0.01, 1.0), ("c", 0.0055, 0.5), ("b", 0.0015, 0.5)
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="saw nothing"):
        summary([], 3)


def test_variants_and_masks_of_the_verdicts_are_those_of_the_ops():
    from gpu_stages import stages
    from op_cases import CASES
    from verdicts import MASKS, VARIANTS
    from verdicts import OPS as known

    assert {variant: op for op, variants in CASES.items() for variant in variants} == VARIANTS
    assert set(known) == set(stages.OPS) == set(CASES) == set(OPS)
    assert set(MASKS) <= set(plans(SHAPES["254m"]))


def checks(backend: str = "triton") -> list[dict]:
    """Rows of a run in which everything passed."""
    from verdicts import MASKS, VARIANTS, smoke_item

    items = [(v, op, smoke_item(v, "254m", mask, backend)) for v, op in VARIANTS.items() for mask in MASKS]
    smoke = [{"stage": "smoke", "item": i, "op": op, "backend": backend, "outcome": "ok"} for _, op, i in items]
    tests = [{"stage": "tests", "item": f"test_{op}.py", "op": op, "outcome": "ok"} for op in OPS]
    return [*smoke, *tests, {"stage": "tests", "item": "test_library.py", "op": None, "outcome": "ok"}]


def measurements() -> list[dict]:
    ops = [{"op": op, "variant": op, "backend": b} for op in OPS for b in ("triton", "public")]
    return [*ops, {"shape": "254m", "backend": "triton"}, {"shape": "254m", "backend": "public"}]


def refused(rows: list[dict]) -> dict[str, str]:
    from verdicts import admitted

    survivors, reasons = admitted(measurements(), rows)
    assert len(survivors) + len(reasons) == len(measurements())
    assert all(row in survivors for row in measurements() if row["backend"] == "public")
    return reasons


def test_an_op_that_failed_is_not_reported_nor_are_whole_steps():
    assert refused(checks()) == {}
    crash = {"stage": "smoke", "item": "attention, window, 254m, pure forget, triton", "outcome": "crashed"}
    reasons = refused([*checks(), crash | {"error": "SIGSEGV"}])
    assert reasons["attention in triton"] == "attention: attention, window, 254m, pure forget, triton: SIGSEGV"
    assert set(reasons) == {"attention in triton", "whole steps in triton"}
    assert refused([*checks(), crash | {"error": "SIGSEGV"}, crash | {"outcome": "ok"}]) == {}  # run again since
    other = crash | {"item": crash["item"].replace("triton", "torch"), "error": "SIGSEGV"}
    assert refused([*checks(), other]) == {}


def test_red_tests_of_an_op_refuse_it_wherever_they_lie():
    red = {"stage": "tests", "test": "test_dx[pure]", "file": "test_mlp.py", "error": "assert"}
    assert set(refused([*checks(), red])) == {"mlp in triton", "whole steps in triton"}
    assert refused([red, *checks()]) == {}  # passed since
    file = {"stage": "tests", "item": "test_mlp.py", "op": "mlp", "outcome": "failed", "error": "cannot be imported"}
    assert set(refused([*checks(), file])) == {"mlp in triton", "whole steps in triton"}
    library = {"stage": "tests", "test": "test_compiles[cross_entropy]", "file": "test_library.py", "error": "graph"}
    failed = {"stage": "tests", "item": "test_library.py", "op": None, "outcome": "failed"}
    assert set(refused([*checks(), library, failed])) == {"cross_entropy in triton", "whole steps in triton"}


def test_smoke_that_was_cut_refuses_and_tests_that_did_not_run_do_not():
    from verdicts import NOT_RUN, verdicts

    cut = [row for row in checks() if row["item"] != "norm, 254m, pure forget, triton"]
    assert refused(cut)["norm in triton"] == "norm: smoke not run"
    untested = [row for row in checks() if row["stage"] == "smoke"]
    assert refused(untested) == {} and verdicts(untested, "triton")["mlp"].tests == NOT_RUN
    assert len(refused([])) == len(OPS) + 1


def test_a_run_becomes_a_results_file_without_what_its_checks_refuse(tmp_path, monkeypatch):
    import report
    from journal import Journal

    from sgtm_kernels.measurement import environment

    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    run, spread = tmp_path / "run", dict.fromkeys(("p20", "p50", "p80"), 1.0)
    run.mkdir()
    machine = environment() | {"device": "NVIDIA T0 (80GB)", "commit": "v1-3-gabc", "cpu": False}
    (run / "environment.json").write_text(json.dumps(machine))
    rates = {"roofline": {"tflops": spread, "gb_per_second": spread}, "roofline_share": spread}
    measured = {"microseconds": spread, "ratio_public": spread, "public": "SDPA", "mask": "unmasked", "dtype": "bf16"}
    for op in ("norm", "mlp"):
        row = {"item": op, "op": op, "variant": f"{op} itself", "shape": "254m", "backend": "triton", "rounds": 3}
        Journal(run / "ops.jsonl").add(row | measured | rates)
    wrong = {"item": "norm, 254m, unmasked, triton", "outcome": "failed", "error": "dx: 1 > 0.5"}
    for row in [*checks(), {"stage": "smoke"} | wrong]:
        Journal(run / f"{row['stage']}.jsonl").add({k: v for k, v in row.items() if k != "stage"})
    path = report.add(run)
    assert path.parent.name == "nvidia-t0-80gb" and path.name[10:] == "_v1-3-gabc.jsonl"
    text = report.section(path, "")
    assert "| mlp itself |" in text and "| norm itself |" not in text
    assert "Not reported" in text and "norm in triton (norm: norm, 254m, unmasked, triton: dx: 1 > 0.5)" in text
    assert "| norm | failed | passed |" in text and "| mlp | passed | passed |" in text
    (run / "environment.json").write_text(json.dumps(machine | {"cpu": True}))
    with pytest.raises(ValueError, match="--cpu"):
        report.add(run)


def test_a_choice_of_the_tuner_is_a_row_before_the_next_is_made(tmp_path, monkeypatch):
    import tuning_table
    from journal import Journal

    from sgtm_kernels.mlp.kernel import TILES
    from sgtm_kernels.tools.tune import Decision

    rows, counts = tmp_path / "tune.jsonl", []
    choice = Decision(TILES["activation_forward"].candidates("fp32", "plain")[0], 1e-6, 2e-6)

    def tune(*args, decided, **options):
        for _ in range(3):
            decided(("activation_forward", ("fp32", "plain")), choice)
            counts.append(len(Journal(rows).rows()))

    monkeypatch.setattr(tuning_table, "tune", tune)
    arguments = [str(rows), "--table", str(tmp_path / "table.json"), "--only", "mlp", "--shape", "tiny"]
    monkeypatch.setattr(sys, "argv", ["tuning_table.py", *arguments])
    assert tuning_table.main() == 0 and counts == [1, 2, 3]


def test_a_test_file_is_a_row_before_the_next_runs(tmp_path):
    from journal import Journal
    from pytest_rows import RowsPlugin

    rows, journal = RowsPlugin(Journal(tmp_path / "rows.jsonl")), Journal(tmp_path / "rows.jsonl")
    tests = [f"test_{op}.py::test_{i}" for op in ("mlp", "norm") for i in range(2)]
    rows.pytest_collection_finish(SimpleNamespace(items=[SimpleNamespace(nodeid=test) for test in tests]))
    counts = []
    for test in tests:
        for when in ("setup", "call", "teardown"):
            outcome = {"failed": False, "skipped": False, "duration": 0.1}
            rows.pytest_runtest_logreport(SimpleNamespace(nodeid=test, when=when, **outcome))
        counts.append([row["item"] for row in journal.rows()])
    assert counts == [[], ["test_mlp.py"], ["test_mlp.py"], ["test_mlp.py", "test_norm.py"]]
