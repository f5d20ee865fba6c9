"""Which configuration a kernel is launched in: heuristic, table, and the tuner that writes it.

Faults tried, each seen to fail: the table ignored, or read again; a foreign entry used, or warned of at every launch; a
named table that is missing or damaged passed over; the table before SGTM_LINEAR; candidates that are not compiled ahead
of time; a choice by the median alone, by times of different rounds, or of the slowest;
a way decided before its tile; entries that were not measured lost; the
table of another device taken; masks in a key; a grid, or the room for partial sums, of another tile; a bucket too high;
a candidate that does not fit an error; a device's table not found; tuning without a GPU; a table that cannot be written
found after the measurement.
"""

import json
import logging
from collections import Counter
from itertools import pairwise

import pytest
import torch

from sgtm_kernels import tune, tuning
from sgtm_kernels.aot import all_launches
from sgtm_kernels.attention import HeadLayout, attention
from sgtm_kernels.attention import kernel as attention_kernel
from sgtm_kernels.cross_entropy import kernel as cross_entropy_kernel
from sgtm_kernels.linear import kernel as linear_kernel
from sgtm_kernels.linear import linear_in, rectangles, scaling
from sgtm_kernels.mlp import gelu
from sgtm_kernels.mlp import kernel as mlp_kernel
from sgtm_kernels.plan import MAX_SLICES, MaskPlan, RowWork, Slice, Updaters
from sgtm_kernels.shapes import NONE, SGTM, SHAPES, Shape
from sgtm_kernels.testing import assert_accurate, forward_backward, random_like
from sgtm_kernels.tuning import bucket, path_of, table_of, trial

TUNABLES = {
    t.name: t
    for t in (
        *attention_kernel.TILES.values(), *mlp_kernel.TILES.values(), cross_entropy_kernel.TILE, scaling.TILE,
        linear_kernel.WAY, rectangles.TILE,
    )
}  # fmt: skip
SHAPE, LONG = Shape(2, 40, 16, 2, 2, 40, 97, 1, 8), Shape(2, 384, 16, 2, 2, 40, 97, 1, 8)
PLAN = MaskPlan.uniform(NONE, 0, 2, 5)
BOUNDS = (0, 24, 40)
SMALL = mlp_kernel.Tile(4, 8, 2)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("SGTM_TUNED", raising=False)
    monkeypatch.delenv("SGTM_LINEAR", raising=False)
    table_of.cache_clear()
    yield
    table_of.cache_clear()


@pytest.fixture
def others(monkeypatch):
    """Candidates in fp32, which the interpreter is right in, where it is only bf16 that has some."""
    tiles = {
        "attention_forward": (attention_kernel.Tile(16, 16, 4, 1), attention_kernel.Tile(16, 32, 4, 1)),
        "attention_backward_queries": (attention_kernel.Tile(16, 16, 4, 1),),
        "attention_backward_keys": (attention_kernel.Tile(16, 16, 4, 1),),
    }
    for name, configs in tiles.items():
        monkeypatch.setitem(TUNABLES[name].others, ("fp32", 16), configs)
    for name in ("activation_forward", "activation_backward"):
        monkeypatch.setitem(TUNABLES[name].others, ("fp32", "plain"), (SMALL,))
    monkeypatch.setitem(TUNABLES["linear_sums"].others, ("fp32",), (scaling.Tile(16, 16, 64, 4),))
    for length in linear_kernel.LENGTHS:
        monkeypatch.setitem(TUNABLES["linear_dw"].others, ("fp32", 4, length), (linear_kernel.Way("rectangles"),))
    monkeypatch.setitem(
        TUNABLES["dw_rectangles"].others, ("fp32", "ones", "ragged"), (rectangles.Tile(16, 16, 16, 4, 1),)
    )
    monkeypatch.setitem(TUNABLES["token_losses"].others, ("fp32", 128), (cross_entropy_kernel.Tile(32, 1),))


def table(path, name: str, key: str, config: dict):
    path.write_text(json.dumps({"device": "test", "entries": {name: {key: {"config": config}}}}))
    return path


def launched_tile(monkeypatch) -> list[tuple[int, int, int]]:
    """Tile and warps of every launch of the activation's forward kernel from here on."""
    seen, kernel = [], mlp_kernel.activation_forward

    class Spy:
        __name__ = "activation_forward"

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                seen.append((kwargs["BT"], kwargs["BN"], kwargs["num_warps"]))
                return kernel[grid](*args, **kwargs)

            return launch

    monkeypatch.setattr(mlp_kernel, "activation_forward", Spy())
    return seen


def test_buckets():
    assert [bucket(n, 16, 128) for n in (1, 16, 17, 32, 33, 64, 100, 128, 129, 5000)] == [
        16, 16, 32, 32, 64, 64, 128, 128, 128, 128,
    ]  # fmt: skip
    assert bucket(1, 1, 8192) == 1 and bucket(50257, 1, 8192) == 8192


def test_keys_leave_out_what_the_result_must_not_depend_on(monkeypatch):
    """The same choices whether tokens are masked or not, for the kernels that compute outputs and dX."""
    x, qkv = torch.zeros(2, 5, 40), torch.zeros(2, 5, 48)
    asked, layout = [], HeadLayout((1, 1), (1, 1), 8)
    for tables, label in ((NONE, 0), (SGTM, 1)):
        plan = MaskPlan.uniform(tables, label, 2, 5)
        with trial() as seen:
            forward_backward(lambda x, p=plan: gelu(x, p, BOUNDS, "triton"), x)
            forward_backward(lambda x, p=plan: attention(x, layout, p, scale=1.0, backend="triton"), qkv)
        asked.append(set(seen.asked))
    assert asked[0] == asked[1] and len(asked[0]) == 5


@pytest.mark.parametrize(
    ("slices", "wide", "expected"),
    [
        ([(i * 40, i * 40 + 30) for i in range(12)], 0, (4, 64)),
        ([(i * 80, i * 80 + 65) for i in range(12)], 0, (4, 256)),
        ([(i * 80, i * 80 + 40) for i in range(12)], 0, (2, 64)),
        ([(i * 80, i * 80 + 40) for i in range(12)], 1, (3, 64)),  # as many rows again that all tokens update
        ([(i * 2000, i * 2000 + 2000) for i in range(12)], 0, (4, 1024)),
        ([(i * 100, i * 100 + 1) for i in range(12)], 0, (1, 64)),
    ],
)
def test_buckets_of_token_level_work(slices, wide, expected):
    tokens = {40: 480, 80: 960, 2000: 24000, 100: 1200}[slices[1][0] - slices[0][0]]
    work = [RowWork(0, 8, Updaters((1.0,), tuple(Slice(s, e, 1.0) for s, e in slices)))]
    if wide:
        work.append(RowWork(8, 16, Updaters((1.0,), (Slice(0, tokens, 1.0),))))
    share, length = expected
    if slices[0][1] == 30:
        share = 3  # 30 of 40: three quarters exactly
    assert linear_kernel._share_and_length(tuple(work), tokens) == (share, length)


def test_a_table_overrides_the_heuristic_in_a_launch(monkeypatch, tmp_path, others):
    seen, x = launched_tile(monkeypatch), random_like(torch.empty(2, 5, 40), 0)
    plain = gelu(x, PLAN, BOUNDS, "triton")
    path = table(tmp_path / "t.json", "activation_forward", "fp32 plain", SMALL._asdict())
    monkeypatch.setenv("SGTM_TUNED", str(path))
    table_of.cache_clear()
    tuned = gelu(x, PLAN, BOUNDS, "triton")
    monkeypatch.setenv("SGTM_TUNED", "off")
    table_of.cache_clear()
    gelu(x, PLAN, BOUNDS, "triton")
    assert seen == [(32, 64, 4), (4, 8, 2), (32, 64, 4)]
    for out in (plain, tuned):
        exact = gelu(x.double(), PLAN, BOUNDS, "reference")
        assert_accurate(out, torch.nn.functional.gelu(x, approximate="tanh"), exact)


in_the_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="tensors on the CPU")


@in_the_interpreter
@pytest.mark.parametrize("op", tune.CASES)
def test_every_choice_forced_gives_the_same_result(op, others):
    """Each candidate in turn against the heuristic, in the calls that the tuner times."""
    tried = Counter()
    for way in tune.CASES[op](LONG if op == "linear" else SHAPE, torch.device("cpu"), torch.float32):
        with trial():
            expected = flat(way())
        for at, candidates, given in tune.choices(way):
            for config in candidates[1:]:
                with trial({**given, at: config}) as seen:
                    for got, want in zip(flat(way()), expected, strict=True):
                        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
                assert at in seen.asked
                tried[at[0]] += 1
    assert (
        set(tried)
        == {
            "linear": {"linear_sums", "linear_dw", "dw_rectangles"},
            "mlp": {"activation_forward", "activation_backward"},
            "attention": {"attention_forward", "attention_backward_queries", "attention_backward_keys"},
            "cross_entropy": {"token_losses"},
        }[op]
    )


def flat(result) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [x for part in result for x in flat(part)]


def test_the_way_of_dw_is_tuned_and_the_environment_wins(monkeypatch, tmp_path, others):
    used = []
    original = rectangles.weight_gradient
    monkeypatch.setattr(rectangles, "weight_gradient", lambda *args: used.append(1) or original(*args))
    plan = tune.spread(LONG, 1, 24)
    assert len(plan.runs) > 2 * MAX_SLICES
    x, weight = torch.ones(2, 384, 16), torch.ones(40, 16)

    def times(table_path, way) -> int:
        for name, value in (("SGTM_TUNED", str(table_path)), ("SGTM_LINEAR", way)):
            monkeypatch.setenv(name, value)
        table_of.cache_clear()
        used.clear()
        forward_backward(lambda x, w: linear_in(x, w, None, plan, "mlp_in", (0, 32, 40), "triton"), x, weight)
        return len(used)

    path = table(tmp_path / "t.json", "linear_dw", "fp32 4 64", {"way": "rectangles"})
    assert (times("off", ""), times(path, ""), times(path, "masked"), times("off", "rectangles")) == (0, 1, 0, 1)


@pytest.mark.parametrize(
    "config", [{"tokens": 64, "neurons": 64, "warps": 4}, {"tokens": 4, "neurons": 8}, "64", SMALL._asdict() | {"x": 1}]
)
def test_a_foreign_entry_is_ignored_with_one_warning(config, monkeypatch, tmp_path, others, caplog):
    path = table(tmp_path / "t.json", "activation_forward", "fp32 plain", config)
    monkeypatch.setenv("SGTM_TUNED", str(path))
    seen = launched_tile(monkeypatch)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            gelu(torch.zeros(2, 5, 40), PLAN, BOUNDS, "triton")
    assert seen == [(32, 64, 4)] * 2
    (record,) = caplog.records
    assert str(path) in record.getMessage() and "activation_forward" in record.getMessage()


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"entries": {}}', '{"device": "x", "entries": {"a": {"b": {}}}}']
)
def test_a_named_table_that_is_missing_or_damaged_is_an_error(content, monkeypatch, tmp_path):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("SGTM_TUNED", str(path))
    with pytest.raises(ValueError, match=r"no table of kernel configurations: .*t\.json"):
        gelu(torch.zeros(2, 5, 40), PLAN, BOUNDS, "triton")


def test_a_table_is_read_once(monkeypatch, tmp_path, others):
    path = table(tmp_path / "t.json", "activation_forward", "fp32 plain", SMALL._asdict())
    monkeypatch.setenv("SGTM_TUNED", str(path))
    seen = launched_tile(monkeypatch)
    gelu(torch.zeros(2, 5, 40), PLAN, BOUNDS, "triton")
    path.unlink()
    monkeypatch.setenv("SGTM_TUNED", "off")
    gelu(torch.zeros(2, 5, 40), PLAN, BOUNDS, "triton")
    assert seen == [(4, 8, 2)] * 2


def test_the_table_of_a_device_is_found_by_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA T0 (80GB)")
    device = torch.device("cuda", 0)
    assert table_of(device) is None and table_of(torch.device("cpu")) is None
    table_of.cache_clear()
    assert path_of("NVIDIA T0 (80GB)") == tmp_path / "nvidia-t0-80gb.json"
    table(
        tmp_path / "nvidia-t0-80gb.json", "activation_forward", "bf16 plain", {"tokens": 16, "neurons": 128, "warps": 4}
    )
    assert TUNABLES["activation_forward"](device, "bf16", "plain") == mlp_kernel.Tile(16, 128, 4)
    assert TUNABLES["activation_forward"](device, "bf16", "gated") == mlp_kernel.Tile(32, 64, 4)


def constants(name: str, key: tuple, c) -> list[tuple[str, dict]]:
    """Kernels and constants that a configuration means; key[0] is the dtype."""
    if name.startswith("attention"):
        return [(name, {"BQ": c.queries, "BK": c.keys, "BD": key[1]})]
    if name.startswith("activation"):
        return [(name, {"BT": c.tokens, "BN": c.neurons, "GATED": key[1] == "gated"})]
    if name == "token_losses":
        return [(name, {"BLOCK": c.block, "GRADIENT": flag}) for flag in (False, True)]
    if name == "dw_rectangles":
        flags = {"WEIGHTED": key[1] == "weights", "DESCRIPTORS": key[2] == "descriptors"}
        return [(name, {"BR": c.rows, "BC": c.columns, "BT": c.tokens, **flags})]
    blocks = {"BT": c.tokens, "BC": c.columns, "STRIP": c.strip}
    ways = [(scale, place, add) for scale, place in ((0, 0), (1, 0), (1, 1)) for add in (0, 1) if scale or add]
    flags = [{"SCALE": bool(s), "IN_PLACE": bool(p), "SUM": bool(a)} for s, p, a in ways]
    return [("scale_input_and_sum", blocks), *(("scale_and_sum", blocks | f) for f in flags)]


def test_every_candidate_is_compiled_ahead_of_time():
    found = [(launch.kernel.__name__, launch) for _, _, launch in all_launches()]
    count = 0
    for name, tunable in TUNABLES.items():
        for key in tunable.others if name != "linear_dw" else ():
            for config in tunable.candidates(*key):
                for kernel, wanted in constants(name, key, config):
                    count += 1
                    assert any(
                        kernel == there
                        and f"*{key[0]}" in launch.signature.values()
                        and wanted.items() <= launch.constants.items()
                        and launch.num_warps == config.warps
                        and launch.num_stages == getattr(config, "stages", launch.num_stages)
                        for there, launch in found
                    ), (kernel, key, config)
    assert count > 30 and all(2 <= len(t.candidates(*key)) <= 4 for t in TUNABLES.values() for key in t.others)


def test_the_choice_needs_more_than_noise():
    a, b, c = (mlp_kernel.Tile(i, i, i) for i in (1, 2, 3))
    base = [10.0] * 10
    often, mostly, always = [9.0] * 8 + [20.0] * 2, [5.0] * 7 + [10.1] * 3, [9.5] * 10
    assert tune.decide([a, b], [base, mostly]) == tune.Found(a, 10.0, 10.0)
    assert tune.decide([a, b], [base, often]) == tune.Found(b, 9.0, 10.0)
    assert tune.decide([a, b, c], [base, always, often]) == tune.Found(c, 9.0, 10.0)
    assert tune.decide([a, b], [base, base]).config == a
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]  # paired: half the time in every round, whatever the round
    assert tune.decide([a, b], [drift, [t / 2 for t in drift]]) == tune.Found(b, 2.0, 4.0)


class FakeClock:
    """Every way is run once; then a configuration takes as long as `seconds` says, others 1 s."""

    def __init__(self, seconds: dict[str, float]):
        self.answers, self.compared = seconds, []

    def rounds(self, ways, rounds, seconds):
        self.compared.append(list(ways))
        for way in ways.values():
            way()
        return {name: [self.answers.get(name, 1.0)] * rounds for name in ways}


@in_the_interpreter
def test_the_tuner_decides_every_choice_once(others):
    tile, way = rectangles.Tile(16, 16, 16, 4, 1), linear_kernel.Way("rectangles")
    clock, found, said = FakeClock({str(tile): 0.5, str(way): 0.9}), {}, []
    for call in tune.CASES["linear"](LONG, torch.device("cpu"), torch.float32):
        tune.tune_call(call, clock, found, 5, 1.0, said.append)
    names = [at[0] for at in found]
    assert names == ["linear_sums", "dw_rectangles", "linear_dw"]  # the tile of a way before the way
    assert [f.config for f in found.values()] == [scaling.TILE.heuristic("fp32"), tile, way]
    assert (found["linear_dw", ("fp32", 4, 64)].p50, found["linear_dw", ("fp32", 4, 64)].heuristic_p50) == (0.9, 1.0)
    assert len(said) == len(clock.compared) == 3 and all(len(names) == 2 for names in clock.compared)


def test_a_candidate_that_does_not_fit_the_device_is_left_out(others, monkeypatch):
    from triton.runtime.errors import OutOfResources

    def call():
        if TUNABLES["activation_forward"](torch.device("cpu"), "fp32", "plain") == SMALL:
            raise OutOfResources(300_000, 232_448, "shared memory")

    ((at, candidates, given),) = tune.choices(call)
    assert (at, given) == (("activation_forward", ("fp32", "plain")), {})
    assert candidates == [mlp_kernel.Tile(32, 64, 4)]


def test_what_is_written_is_what_is_read(tmp_path, monkeypatch, others):
    path, at = tmp_path / "folder" / "t.json", ("activation_forward", ("fp32", "plain"))
    assert tune.entries_of(path, "T0") == {}
    tune.write(
        path,
        "T0",
        {"token_losses": {"bf16 8192": {"config": {"block": 8192, "warps": 32}}}},
        {at: tune.Found(SMALL, 5e-6, 7e-6)},
        tune.provenance(),
    )
    entry = json.loads(path.read_text())["entries"]["activation_forward"]["fp32 plain"]
    assert entry["p50_microseconds"] == 5 and entry["heuristic_p50_microseconds"] == 7
    assert {"torch", "triton", "driver", "commit", "date"} <= set(entry) and entry["torch"] == torch.__version__
    assert list(path.parent.iterdir()) == [path]
    kept = tune.entries_of(path, "T0")
    tune.write(path, "T0", kept, {at: tune.Found(mlp_kernel.Tile(32, 64, 4), 6e-6, 6e-6)}, {})
    again = json.loads(path.read_text())["entries"]
    assert set(again) == {"token_losses", "activation_forward"}
    assert again["activation_forward"]["fp32 plain"]["config"]["tokens"] == 32
    with pytest.raises(ValueError, match=r"table of T0, this is T1"):
        tune.entries_of(path, "T1")
    monkeypatch.setenv("SGTM_TUNED", str(path))
    assert TUNABLES["activation_forward"](torch.device("cpu"), "fp32", "plain") == mlp_kernel.Tile(32, 64, 4)


def test_without_a_gpu_it_refuses(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--table", str(tmp_path / "t.json")]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    for arguments, message in ((["--only", "norm"], "unknown op 'norm'"), (["--shape", "1b"], "unknown shape '1b'")):
        assert tune.main(arguments) == 1
        assert message in capsys.readouterr().err


def test_a_table_that_cannot_be_written_is_known_before_anything_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA T0")
    monkeypatch.setattr(tune, "CASES", {"mlp": lambda *args: pytest.fail("measured")})
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        assert tune.main(["--table", str(folder / "t.json")]) == 1
        assert str(tmp_path / "file") in capsys.readouterr().err
    monkeypatch.setattr(tune, "CASES", {"mlp": lambda *args: []})
    assert tune.main(["--table", str(tmp_path / "new" / "t.json"), "--commit", "v1"]) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.json"]


@pytest.mark.parametrize(("quarters", "length"), [(1, 24), (2, 7), (3, 5), (1, 64)])
def test_spread(quarters, length):
    plan = tune.spread(SHAPES["tiny"] if length < 10 else LONG, quarters, length)
    (first, *_), forget = plan.runs, sum(run.end - run.start for run in plan.runs if run.label == 2)
    assert first.end == length and all(a.end == b.start for a, b in pairwise(plan.runs))
    assert forget / plan.tokens == pytest.approx(quarters / 4, abs=0.25 if plan.tokens < 100 else 0.06)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tuning_on_the_gpu(tmp_path):
    path = tune.tune(["mlp"], ["tiny"], tmp_path / "t.json", "test", rounds=3, seconds=0.5)
    assert set(json.loads(path.read_text())["entries"]) == {"activation_forward", "activation_backward"}
