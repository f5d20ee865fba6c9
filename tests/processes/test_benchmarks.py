"""The benchmark of the ops, and the kernels' tests on a GPU machine, as far as they go without one."""

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
def bare(tmp_path) -> dict[str, str]:
    return environment_without(ABSENT, tmp_path)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("ops", ["--mask", "25 % forget,foo"], "argument --mask: 'foo' is none of unmasked, "),
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


def kernel_tests(tmp_path: Path, *ops: str) -> list[list[str]]:
    """The commands of the stage `tests`."""
    from gpu_stages.stages import stages

    (stage,) = stages(tmp_path, only=["tests"], ops=ops)
    return [unit.command(60) for unit in stage.units]


def collecting(command: list[str]) -> list[str]:
    """Without xdist, which a bare machine may lack: options come before files."""
    workers = command.index("-n") if "-n" in command else len(command)
    return [*command[:workers], *command[workers + 6 :], "--collect-only"]


def test_the_kernels_tests_are_collected_on_a_bare_machine(bare, tmp_path):
    """All of them but those of plan.py and aot.py, each once; a plain pytest, with the strict options, is refused."""
    bare = bare | {"PYTHONPATH": f"{bare['PYTHONPATH']}:{ROOT / 'benchmarks'}"}
    done = [execute(collecting(command), bare) for command in kernel_tests(tmp_path)]
    assert all(d.returncode == 0 for d in done), [d.stdout + d.stderr for d in done]
    for path in (ROOT / "tests" / "kernels").glob("test_*.py"):
        files = sum(f"tests/kernels/{path.name}" in d.stdout for d in done)
        assert files == (path.name not in ("test_plan.py", "test_aot.py")), path.name
    assert execute([sys.executable, "-m", "pytest", "--collect-only", "tests/kernels/test_norm.py"], bare).returncode
    blocked = execute([sys.executable, "-c", "import sgtm"], bare)
    assert "No module named 'sgtm'" in blocked.stderr


def test_tests_of_one_op_are_its_files(tmp_path):
    ((*_, first, second, third, fourth), rest) = kernel_tests(tmp_path, "attention")
    assert [Path(file).name for file in (first, second, third, fourth)] == [
        "test_attention.py", "test_attention_blocks.py", "test_attention_heads.py", "test_attention_public.py"
    ]  # fmt: skip
    assert rest[-1] == ""  # nothing


def tiny(to: Path, *more: str) -> list[str]:
    command = [sys.executable, "benchmarks/ops.py", "--shape", "tiny,tiny-llama", "--json", str(to)]
    return [*command, "--backend", "torch", "--device", "cpu", "--rounds", "3", *more]


def test_every_op_is_timed_under_every_mask(bare, tmp_path):
    from op_cases import CASES

    from sgtm_kernels.tools.shapes import SHAPES, plans

    done = execute(tiny(tmp_path / "ops.jsonl"), bare)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "ops.jsonl").read_text().splitlines()]
    ours = [(r["shape"], r["variant"], r["mask"]) for r in rows if r["backend"] == "torch"]
    shapes = ("tiny", "tiny-llama")
    slow = ["attention, window", "attention, documents"]  # whose public calls compile longest: last
    variants = [v for op in CASES for v in CASES[op] if v not in slow] + slow
    assert ours == [(s, v, m) for s in shapes for v in variants for m in plans(SHAPES[s])]
    for row in rows:
        assert row["rounds"] == 3 and row["versions"]["torch"] and row["commit"] is not None
        for key in ("microseconds", "ratio_public", "roofline_share"):
            assert 0 < row[key]["p20"] <= row[key]["p50"] <= row[key]["p80"]
        assert ("ratio_unmasked" in row) == (row["backend"] == "torch")
        if row["mask"] in ("unmasked", row["public"]):
            key = "ratio_unmasked" if row["backend"] == "torch" else "ratio_public"
            assert row[key] == {"p20": 1, "p50": 1, "p80": 1}
    from gpu_run import ops as table

    assert table(rows).count("\n|") == len(rows) + 2


@pytest.mark.parametrize("name", ["tiny", "tiny-llama", "254m"])
def test_the_work_that_each_mask_leaves(name):
    """dW of a linear layer and of the head, heads of attention, rows of AdamW: counted from the plan alone."""
    from op_cases import CASES, Inputs

    from sgtm_kernels.tools.shapes import SHAPES, plans

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

    from sgtm_kernels.tools.shapes import SHAPES, plans

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
    for call in (
        case.ours(plans(shape)["25 % forget"], "torch"),
        case.public["SDPA"],
        case.public["FlexAttention"],
    ):
        call()
    pieces = tuple((t, t + 3) for t in range(0, shape.tokens, 3)) if documents > 1 else None
    assert seen == [(window, pieces)] * 3


def test_rounds_are_paired_and_their_order_changes():
    from sgtm_kernels.tools.timing import Clock

    calls = []
    calls_by_name = {name: lambda name=name: calls.append(name) for name in "abcd"}
    times = Clock(torch.device("cpu")).rounds(calls_by_name, 20, seconds=60)
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys("abcd", 20)
    rounds = ["".join(calls[i : i + 4]) for i in range(8, len(calls), 4)]
    assert all(sorted(order) == list("abcd") for order in rounds) and len(set(rounds)) > 5
    assert len(Clock(torch.device("cpu")).rounds(calls_by_name, 20, seconds=0)["a"]) == 3


def test_the_roofline_is_the_slower_of_the_two_rates():
    from roofline import COPY, MATMUL, Roofline

    roofline = Roofline(torch.device("cpu"), torch.float32)
    times = {MATMUL: 2.0, COPY: 0.5}
    assert roofline.ideal(3 * roofline.flops, roofline.bytes, times) == 6.0
    assert roofline.ideal(roofline.flops, 8 * roofline.bytes, times) == 4.0
    assert roofline.rates({MATMUL: [2.0], COPY: [0.5]})["tflops"] == [roofline.flops / 2e12]


def test_a_row_is_a_call_against_calls_of_the_same_round():
    """Two rounds, the second at half the speed: ratios and shares of the roofline do not see it."""
    from op_cases import OpCase
    from ops import measure
    from roofline import COPY, MATMUL, Roofline

    from sgtm_kernels.tools.shapes import SHAPES

    class TwoRounds:
        def rounds(self, calls_by_name, rounds, seconds):
            once = {"slow": 8.0, "fast": 2.0, MATMUL: 1.0, COPY: 1.0} | {("torch", "unmasked"): 4.0}
            return {name: [once.get(name, 1.0), 2 * once.get(name, 1.0)] for name in calls_by_name}

    roofline = Roofline(torch.device("cpu"), torch.float32)
    public = {"slow": lambda: 0, "fast": lambda: 0, "broken": lambda: torch.ones(2) @ torch.ones(3)}
    case = OpCase(lambda plan, backend: lambda: 0, public, lambda plan: (roofline.flops, 0), lambda *arguments: {})
    args = type("Args", (), {"rounds": 2, "seconds": 1, "mask": ["pure forget"]})
    rows = {r["mask"]: r for r in measure(case, SHAPES["tiny"], ["torch"], TwoRounds(), roofline, args)}
    assert "broken" not in rows and {r["public"] for r in rows.values()} == {"fast"}
    for mask, unmasked, to_public, share in [
        ("slow", None, 4, 0.125),
        ("unmasked", 1, 2, 0.25),
        ("pure forget", 0.25, 0.5, 1),
    ]:
        got = [rows[mask].get(key, {"p50": None}) for key in ("ratio_unmasked", "ratio_public", "roofline_share")]
        assert [set(values.values()) for values in got] == [{unmasked}, {to_public}, {share}]


def test_a_variant_that_fails_is_a_row_and_what_is_measured_is_not_measured_again(monkeypatch, tmp_path):
    import ops
    from journal import Journal
    from op_cases import CASES

    rows, called = tmp_path / "ops.jsonl", []

    def broken(shape, make):
        called.append(shape)
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(CASES, "mlp", {"activation": broken})
    command = ["ops.py", "--only", "mlp,norm", "--mask", "pure forget", *tiny(rows)[4:], "--shape", "tiny"]
    monkeypatch.setattr(sys, "argv", command)
    assert ops.main() == 1
    records = Journal(rows).rows()
    assert [row["item"].split(",")[0] for row in records] == ["activation", *["norm"] * 3]
    assert records[0]["outcome"] == "failed" and records[0]["error"] == "RuntimeError: no such kernel"
    assert [row["mask"] for row in records[1:]] == ["F.layer_norm", "unmasked", "pure forget"]
    assert ops.main() == 0 and Journal(rows).rows() == records and len(called) == 1


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
