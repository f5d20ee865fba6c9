"""The GPU script and the benchmark of the ops, as far as they go without a GPU and without the packages of `sgtm`.

Faults tried, each seen to fail: an import of `sgtm` or of rich in a script, or in a test of the kernels; the kernels
not found from a script; the timeout option left strict; results written after red tests; the ways in one order in every
round; the work of a mask without the mask; a ratio, or a share, upside down; the slowest public call; the first round's
rates for all rounds; the tensors of a kernel's test left on the CPU; a file of an op's tests left out; the window or
the documents of attention left out, of ours, of the public calls, or of the work; steps timed before the ops, after the
tests of some ops alone, or at the ops' shape; rows lost, or success said, where steps fail; steps left out of the
report, or shown as ops; arguments of which nothing comes (no rounds, no such op, CUDA without a device) found late.
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from bare import ABSENT, ROOT, environment_without, execute

SCRIPTS = ("ops", "steps")

pytestmark = pytest.mark.usefixtures("benchmarks")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def gpu(monkeypatch):
    """The script, on a machine that says it has a GPU."""
    import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T0 (80GB)")
    return gpu


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    return environment_without(ABSENT, tmp_path)


def test_without_a_gpu_it_says_so(bare, tmp_path):
    """Found without a path to the kernels too: `python benchmarks/gpu.py` is all that is typed there."""
    alone = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tmp_path)}
    done = execute([sys.executable, "benchmarks/gpu.py"], bare | alone)
    assert (done.returncode, done.stdout) == (1, "") and "no CUDA device" in done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("gpu", ["--only", "mlp,foo"], "argument --only: 'foo' is none of linear, "),
        *((script, ["--rounds", "0"], "--rounds: expected a whole number above 0, got '0'") for script in SCRIPTS),
        *((script, ["--rounds", "few"], "--rounds: expected a whole number above 0, got 'few") for script in SCRIPTS),
        *((script, ["--device", "cuda"], "--device: there is no CUDA device here") for script in SCRIPTS),
        *((script, ["--device", "tpu"], "--device: no device 'tpu'; cpu or cuda") for script in SCRIPTS),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(script, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_kernels_tests_are_collected_on_a_bare_machine(bare, gpu):
    """All of them but those of plan.py and aot.py; and a plain pytest, with the strict options, is refused there."""
    done = execute([*gpu.test_command([]), "--collect-only"], bare)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in (ROOT / "tests" / "kernels").glob("test_*.py"):
        assert (f"tests/kernels/{path.name}" in done.stdout) == (path.name not in ("test_plan.py", "test_aot.py"))
    assert execute([sys.executable, "-m", "pytest", "--collect-only", "tests/kernels/test_norm.py"], bare).returncode
    blocked = execute([sys.executable, "-c", "import sgtm"], bare)
    assert "No module named 'sgtm'" in blocked.stderr


def test_tests_of_one_op_run_on_a_bare_machine(bare, gpu):
    done = execute([*gpu.test_command(["norm"]), "-k", "runs and uniform and not test_dx"], bare)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
    assert "test_norm" in str(gpu.test_command(["norm"])) and "test_mlp" not in str(gpu.test_command(["norm"]))
    assert {"test_attention.py", "test_attention_blocks.py", "test_attention_public.py"} == {
        Path(word).name for word in gpu.test_command(["attention"]) if word.endswith(".py")
    }


def tiny(gpu, to: Path, *more: str) -> list[str]:
    return [*gpu.ops_command([], "tiny,tiny-llama", to), "--backend", "runs", "--device", "cpu", "--rounds", "3", *more]


def test_every_op_is_timed_under_every_mask(bare, gpu, tmp_path):
    from op_cases import CASES

    from sgtm_kernels.shapes import SHAPES, plans

    done = execute(tiny(gpu, tmp_path / "ops.jsonl"), bare)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "ops.jsonl").read_text().splitlines()]
    ours = [(r["shape"], r["variant"], r["mask"]) for r in rows if r["backend"] == "runs"]
    shapes = ("tiny", "tiny-llama")
    assert ours == [(s, v, m) for s in shapes for op in CASES for v in CASES[op] for m in plans(SHAPES[s])]
    for row in rows:
        assert row["rounds"] == 3 and row["versions"]["torch"] and row["commit"] is not None
        for key in ("microseconds", "ratio_public", "roofline_share"):
            assert 0 < row[key]["p20"] <= row[key]["p50"] <= row[key]["p80"]
        assert ("ratio_unmasked" in row) == (row["backend"] == "runs")
        if row["mask"] in ("unmasked", row["public"]):
            key = "ratio_unmasked" if row["backend"] == "runs" else "ratio_public"
            assert row[key] == {"p20": 1, "p50": 1, "p80": 1}
    from report import ops as table

    assert table(rows).count("\n|") == len(rows) + 2


@pytest.mark.parametrize("name", ["tiny", "tiny-llama", "254m"])
def test_the_work_that_each_mask_leaves(name):
    """dW of a linear layer and of the head, heads of attention, rows of AdamW: counted from the plan alone."""
    from op_cases import CASES, Inputs

    from sgtm_kernels.shapes import SHAPES, plans

    shape, meta = SHAPES[name], Inputs(torch.device("meta"), torch.bfloat16)
    masks = plans(shape)
    share = shape.forget_neurons / shape.neurons

    def relative(op, variant, index=0):
        work = CASES[op][variant](shape, meta).work
        return {mask: work(plan)[index] / work(masks["unmasked"])[index] for mask, plan in masks.items()}

    third = {"nothing masked": 1, "unmasked": 1, "pure forget": (2 + share) / 3, "pure retain": 1 - share / 3}
    quarter = 1 - 0.25 * (1 - share) / 3
    for side in ("linear_in", "linear_out"):
        assert relative("linear", side) == pytest.approx(
            {m: third.get(m, quarter if m.startswith("25") else 1 - 0.05 * (1 - share) / 3) for m in masks}
        )
    head = relative("cross_entropy", "linear_cross_entropy")
    assert (head["pure forget"], head["pure retain"]) == pytest.approx((2 / 3, 1))
    heads = relative("attention", "attention")
    assert (heads["pure forget"], heads["pure retain"]) == pytest.approx((1, 1 - shape.forget_heads / shape.heads))
    whole, *cut = (
        CASES["attention"][f"attention{what}"](shape, meta).work(masks["unmasked"])[0]
        for what in ("", ", window", ", documents")
    )
    assert [work / whole for work in cut] == [7 / 16, 1 / 4]
    adamw = relative("adamw", "adamw", index=1)
    assert (adamw["pure forget"], adamw["pure retain"]) == pytest.approx((share, 1 - share))


@pytest.mark.parametrize(("variant", "window", "documents"), [("window", 3, 1), ("documents", None, 4)])
def test_ours_and_public_attention_see_the_same_keys(variant, window, documents, monkeypatch):
    import op_cases

    from sgtm_kernels.shapes import SHAPES, plans

    seen = []
    attend, sdpa = op_cases.attention, op_cases.by_sdpa

    def ours(qkv, layout, plan, **options):
        seen.append((options["window"], plan.documents))
        return attend(qkv, layout, plan, **options)

    def public(q, k, v, scale, visible):
        seen.append((visible.window, visible.documents))
        return sdpa(q, k, v, scale, visible)

    monkeypatch.setattr(op_cases, "attention", ours)
    monkeypatch.setattr(op_cases, "by_sdpa", public)
    monkeypatch.setattr(op_cases, "by_flex", public)
    shape = SHAPES["tiny"]
    make = op_cases.Inputs(torch.device("cpu"), torch.float32)
    make.compiled = True  # as on CUDA
    case = op_cases.CASES["attention"][f"attention, {variant}"](shape, make)
    for way in (
        case.ours(plans(shape)["25 % forget"], "runs"),
        case.public["SDPA"],
        case.public["FlexAttention"],
    ):
        way()
    pieces = tuple((t, t + 3) for t in range(0, shape.tokens, 3)) if documents > 1 else None
    assert seen == [(window, pieces)] * 3


def test_rounds_are_paired_and_their_order_changes():
    from sgtm_kernels.timing import Clock

    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "abcd"}
    times = Clock(torch.device("cpu")).rounds(ways, 20, seconds=60)
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys("abcd", 20)
    rounds = ["".join(calls[i : i + 4]) for i in range(8, len(calls), 4)]
    assert all(sorted(order) == list("abcd") for order in rounds) and len(set(rounds)) > 5
    assert len(Clock(torch.device("cpu")).rounds(ways, 20, seconds=0)["a"]) == 3


def test_the_roofline_is_the_slower_of_the_two_rates():
    from roofline import COPY, MATMUL, Roofline

    roofline = Roofline(torch.device("cpu"), torch.float32)
    times = {MATMUL: 2.0, COPY: 0.5}
    assert roofline.ideal(3 * roofline.flops, roofline.bytes, times) == 6.0
    assert roofline.ideal(roofline.flops, 8 * roofline.bytes, times) == 4.0
    assert roofline.rates({MATMUL: [2.0], COPY: [0.5]})["tflops"] == [roofline.flops / 2e12]


def test_a_row_is_a_call_against_calls_of_the_same_round():
    """Two rounds, the second at half the speed: ratios and shares of the roofline do not see it."""
    from op_cases import Case
    from ops import measure
    from roofline import COPY, MATMUL, Roofline

    from sgtm_kernels.shapes import SHAPES

    class TwoRounds:
        def rounds(self, ways, rounds, seconds):
            once = {"slow": 8.0, "fast": 2.0, MATMUL: 1.0, COPY: 1.0} | {("runs", "unmasked"): 4.0}
            return {name: [once.get(name, 1.0), 2 * once.get(name, 1.0)] for name in ways}

    roofline = Roofline(torch.device("cpu"), torch.float32)
    public = {"slow": lambda: 0, "fast": lambda: 0, "broken": lambda: torch.ones(2) @ torch.ones(3)}
    case = Case(lambda plan, backend: lambda: 0, public, lambda plan: (roofline.flops, 0))
    args = type("Args", (), {"rounds": 2, "seconds": 1})
    rows = {r["mask"]: r for r in measure(case, SHAPES["tiny"], ["runs"], TwoRounds(), roofline, args)}
    assert "broken" not in rows and {r["public"] for r in rows.values()} == {"fast"}
    for mask, unmasked, to_public, share in [
        ("slow", None, 4, 0.125),
        ("unmasked", 1, 2, 0.25),
        ("pure forget", 0.25, 0.5, 1),
    ]:
        got = [rows[mask].get(key, {"p50": None}) for key in ("ratio_unmasked", "ratio_public", "roofline_share")]
        assert [set(values.values()) for values in got] == [{unmasked}, {to_public}, {share}]


def test_red_tests_leave_nothing(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "test_command", lambda only: [sys.executable, "-c", "print('2 failed'); exit(3)"])
    monkeypatch.setattr(gpu, "ops_command", lambda *args: pytest.fail("timed after red tests"))
    assert gpu.main(["--results", str(tmp_path)]) == 3
    assert list(tmp_path.iterdir()) == [] and "red tests (2 failed)" in capsys.readouterr().err


def test_green_tests_and_timings_become_a_results_file(gpu, monkeypatch, tmp_path):
    original = gpu.ops_command
    monkeypatch.setattr(gpu, "test_command", lambda only: [sys.executable, "-c", f"print({len(only)}, 'passed')"])
    monkeypatch.setattr(
        gpu, "ops_command", lambda *args: [*original(*args), "--backend", "runs", "--device", "cpu", "--rounds", "3"]
    )
    options = ["--only", "mlp,norm", "--shape", "tiny", "--commit", "v1-3-gabc", "--results", str(tmp_path)]
    assert gpu.main(options) == 0
    (path,) = tmp_path.rglob("*.jsonl")
    assert path.parent.name == "nvidia-t0-80gb" and path.name[10:] == "_v1-3-gabc.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["op"] for row in rows} == {"mlp", "norm"}
    assert all(row["tests"] == "2 passed" and row["commit"] == "v1-3-gabc" for row in rows)
    assert all(key in row for row in rows for key in ("device", "driver", "versions", "time"))


CPU = ["--device", "cpu", "--backend", "runs", "--rounds", "3"]


def test_steps_are_timed_after_the_ops_and_want_the_tests_of_all(gpu, monkeypatch, tmp_path):
    originals, tested = (gpu.ops_command, gpu.steps_command), []
    monkeypatch.setattr(gpu, "test_command", lambda only: tested.append(only) or [sys.executable, "-c", "print(7)"])
    monkeypatch.setattr(gpu, "ops_command", lambda *args: [*originals[0](*args), *CPU])
    monkeypatch.setattr(gpu, "steps_command", lambda *args: [*originals[1](*args), *CPU])
    options = ["--only", "norm,steps", "--shape", "tiny", "--commit", "gabc", "--results", str(tmp_path)]
    assert gpu.main(options) == 0 and tested == [[]]
    (path,) = tmp_path.rglob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = [row.get("op", "step") for row in rows]
    assert kinds == sorted(kinds) and {"norm", "step"} == set(kinds) and kinds.count("step") > 10
    assert all(row["tests"] == "7" and row["commit"] == "gabc" for row in rows)

    monkeypatch.setattr("report.ROOT", tmp_path)
    from report import section

    text = section(path, "")
    assert text.index("### What a masked op costs") < text.index("### What a masked step costs")
    assert text.count("\n|") == len(rows) + 4


def test_what_was_timed_before_a_failure_is_kept(gpu, monkeypatch, tmp_path):
    original, called = gpu.ops_command, []
    failing = [sys.executable, "-c", "exit(5)"]
    monkeypatch.setattr(gpu, "test_command", lambda only: called.append(only) or [sys.executable, "-c", "print(7)"])
    monkeypatch.setattr(gpu, "ops_command", lambda only, *args: [*original(["norm"], *args), *CPU])
    monkeypatch.setattr(gpu, "steps_command", lambda *args: failing)
    options = ["--shape", "tiny", "--commit", "gabc", "--results", str(tmp_path)]
    assert gpu.main(options) == 5
    (path,) = tmp_path.rglob("*.jsonl")
    assert {json.loads(line)["op"] for line in path.read_text().splitlines()} == {"norm"}
    path.unlink()
    monkeypatch.setattr(gpu, "ops_command", lambda *args: pytest.fail("ops are timed"))
    assert gpu.main(["--only", "steps", *options]) == 5 and not list(tmp_path.rglob("*.jsonl"))
    assert called == [[], []]


def test_shapes_are_those_asked_for_or_each_benchmark_s_own(gpu, tmp_path):
    assert gpu.steps_command([], "", tmp_path)[2:] == ["--json", str(tmp_path)]
    assert gpu.steps_command([], "124m", tmp_path)[2:] == ["--shape", "124m", "--json", str(tmp_path)]
    assert gpu.ops_command(["mlp"], "", tmp_path)[2:] == ["--only", "mlp", "--shape", "254m", "--json", str(tmp_path)]


def test_kernel_tests_put_their_tensors_on_the_gpu():
    """Fixture and generators of tests/kernels/conftest.py, with the device `meta` for a GPU."""
    spec = importlib.util.spec_from_file_location("conftest_of_kernels", ROOT / "tests" / "kernels" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)

    def drawn():
        generator = torch.Generator().manual_seed(1)
        return torch.randn(3, generator=generator), torch.randint(5, (2,), generator=generator)

    plain = drawn()
    with conftest.tensors_on("meta"):
        assert torch.zeros(2).is_meta and torch.tensor([1.0]).is_meta and all(x.is_meta for x in drawn())
        assert torch.zeros(2, device="cpu").device.type == "cpu"
    with conftest.tensors_on("cpu"):
        assert all(torch.equal(x, y) for x, y in zip(plain, drawn(), strict=True))
    assert torch.zeros(2).device.type == "cpu"
