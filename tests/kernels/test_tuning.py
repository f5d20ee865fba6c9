"""Which configuration a kernel is launched in: heuristic or table. The tuner that writes it: test_tune.py."""

import json
import logging
from collections import Counter

import pytest
import torch
from tunables import BOUNDS, LONG, PLAN, SHAPE, SMALL, TUNABLES, in_the_interpreter

from sgtm_kernels.attention import HeadLayout, attention
from sgtm_kernels.linear import kernel as linear_kernel
from sgtm_kernels.linear import linear_in, rectangles
from sgtm_kernels.mlp import gelu
from sgtm_kernels.mlp import kernel as mlp_kernel
from sgtm_kernels.plan import MAX_SLICES, MaskPlan, RowWork, Slice, Updaters
from sgtm_kernels.testing import assert_accurate, forward_backward, random_like
from sgtm_kernels.tools import tune
from sgtm_kernels.tools.aot import all_variants
from sgtm_kernels.tools.shapes import NONE, SGTM
from sgtm_kernels.triton_common import tuning
from sgtm_kernels.triton_common.tuning import bucket, path_of, table_of, trial


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
    choices, layout = [], HeadLayout((1, 1), (1, 1), 8)
    for tables, label in ((NONE, 0), (SGTM, 1)):
        plan = MaskPlan.uniform(tables, label, 2, 5)
        with trial() as seen:
            forward_backward(lambda x, p=plan: gelu(x, p, BOUNDS, "triton"), x)
            forward_backward(lambda x, p=plan: attention(x, layout, p, scale=1.0, backend="triton"), qkv)
        choices.append(set(seen.tunables))
    assert choices[0] == choices[1] and len(choices[0]) == 5


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


@in_the_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("op", tune.CASES)
def test_every_choice_forced_gives_the_same_result(op, others):
    """Each candidate in turn against the heuristic, in the calls that the tuner times."""
    tried = Counter()
    for call in tune.CASES[op](LONG if op == "linear" else SHAPE, torch.device("cpu"), torch.float32):
        with trial():
            expected = flat(call())
        for choice, candidates, needed in tune.choices(call):
            for config in candidates[1:]:
                with trial({**needed, choice: config}) as seen:
                    for got, want in zip(flat(call()), expected, strict=True):
                        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
                assert choice in seen.tunables
                tried[choice[0]] += 1
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


def test_the_algorithm_of_dw_is_tuned_and_the_environment_wins(monkeypatch, tmp_path, others):
    used = []
    original = rectangles.weight_gradient
    monkeypatch.setattr(rectangles, "weight_gradient", lambda *args: used.append(1) or original(*args))
    plan = tune.spread(LONG, 1, 24)
    assert len(plan.label_runs) > 2 * MAX_SLICES
    x, weight = torch.ones(2, 384, 16), torch.ones(40, 16)

    def times(table_path, algorithm) -> int:
        for name, value in (("SGTM_TUNED", str(table_path)), ("SGTM_LINEAR", algorithm)):
            monkeypatch.setenv(name, value)
        table_of.cache_clear()
        used.clear()
        forward_backward(lambda x, w: linear_in(x, w, None, plan, "mlp_in", (0, 32, 40), "triton"), x, weight)
        return len(used)

    path = table(tmp_path / "t.json", "linear_dw", "fp32 4 64", {"algorithm": "rectangles"})
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
    writes = [(scale, in_place, add) for scale, in_place in ((0, 0), (1, 0), (1, 1)) for add in (0, 1) if scale or add]
    flags = [{"SCALE": bool(s), "IN_PLACE": bool(p), "SUM": bool(a)} for s, p, a in writes]
    return [("scale_input_and_sum", blocks), *(("scale_and_sum", blocks | f) for f in flags)]


def test_every_candidate_is_compiled_ahead_of_time():
    launches = [(launch.kernel.__name__, launch) for _, _, launch in all_variants()]
    count = 0
    for name, tunable in TUNABLES.items():
        for key in tunable.others if name != "linear_dw" else ():
            for config in tunable.candidates(*key):
                for kernel, wanted in constants(name, key, config):
                    count += 1
                    assert any(
                        kernel == kernel_name
                        and f"*{key[0]}" in launch.signature.values()
                        and wanted.items() <= launch.constants.items()
                        and launch.num_warps == config.warps
                        and launch.num_stages == getattr(config, "stages", launch.num_stages)
                        for kernel_name, launch in launches
                    ), (kernel, key, config)
    assert count > 30 and all(2 <= len(t.candidates(*key)) <= 4 for t in TUNABLES.values() for key in t.others)
