"""The self-check passes what computes what the reference computes, and names the op of a kernel that does not.

Every fault below is a kernel broken on purpose, one at a time; the check must find it and blame that op.
"""

import json

import pytest
import torch

from sgtm_kernels import selfcheck
from sgtm_kernels.attention import HeadLayout, attention
from sgtm_kernels.cross_entropy import linear_cross_entropy
from sgtm_kernels.dispatch import OPS, fall_back, pick, replaced, served
from sgtm_kernels.embedding import embedding
from sgtm_kernels.linear import linear_in, linear_out
from sgtm_kernels.mlp import linear_gelu
from sgtm_kernels.norm import layer_norm
from sgtm_kernels.plan import LabelRun, MaskPlan
from sgtm_kernels.selfcheck import Passed, check, record_op_calls
from sgtm_kernels.tools.shapes import FORGET, RETAIN, SGTM, UNLABELED
from sgtm_kernels.triton_common.tuning import table_of

CPU = torch.device("cpu")
HEADS = HeadLayout((3, 1), (3, 1), 8)
BOUNDS, QKV, ROWS = (0, 24, 32), (0, 72, 96), (0, 24, 32)


def plans() -> list[MaskPlan]:
    mixed = (LabelRun(FORGET, 0, 5), LabelRun(UNLABELED, 5, 20), LabelRun(RETAIN, 20, 40))
    return [MaskPlan.uniform(SGTM, FORGET, 2, 20), MaskPlan(SGTM, mixed, 2, 20)]


def layer(plan: MaskPlan) -> torch.Tensor:
    """A small layer on the reference."""

    def weight(*shape, scale=0.2):
        return (scale * torch.randn(shape, generator=generator)).requires_grad_()

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (2, 20), generator=generator)
    table, ones, zeros = weight(50, 32), (1 + weight(32)).detach().requires_grad_(), weight(32)
    x = embedding(ids, table, plan, "embedding", "reference")
    normed = layer_norm(x, ones, zeros, 1e-5, plan, "norm", "reference")
    qkv = linear_in(normed, weight(96, 32), None, plan, "attn_in", QKV, "reference", overwrite=True)
    heads = attention(qkv, HEADS, plan, scale=0.4, backend="reference")
    x = x + linear_out(heads, weight(32, 32), weight(32), plan, "attn_out", ROWS, "reference")
    hidden = linear_gelu(x, weight(32, 32), weight(32), plan, BOUNDS, "reference")
    x = x + linear_out(hidden, weight(32, 32), weight(32), plan, "mlp_out", BOUNDS, "reference")
    return linear_cross_entropy(x, table, None, ids, plan, 1 / 40, "reference")[0]


@pytest.fixture(scope="module")
def calls():
    with record_op_calls() as calls:
        for plan in plans():
            layer(plan)
            layer(plan)  # the same calls: kept once
    return calls


def test_every_call_is_kept_once(calls):
    assert [call.op for call in calls] == 2 * [
        "embedding", "norm", "linear", "attention", "linear", "mlp", "linear", "cross_entropy"
    ]  # fmt: skip
    assert len({call.signature for call in calls}) == len(calls)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_right_backend_passes(calls, backend):
    assert check(calls, backend, CPU) == dict.fromkeys(OPS)


class Broken:
    """An op's module with one function replaced."""

    def __init__(self, op: str, function: str, change):
        self.module, self.function = pick(op, "torch"), function
        self.change = change

    def __getattr__(self, name: str):
        original = getattr(self.module, name)
        return self.change(original) if name == self.function else original


def scaled(original):
    return lambda *args, **options: original(*args, **options) * 1.05


def gradient_only(original):
    """The output is right and its gradient half of what it should be."""

    def wrong(*args, **options):
        y = original(*args, **options)
        return (0.5 * y) + (0.5 * y).detach()

    return wrong


def unmasked(original):
    """What the op does where nothing is masked."""

    def wrong(x, weight, bias, plan, part, bounds, *rest):
        return original(x, weight, bias, plan, part, (0, bounds[-1]), *rest)

    return wrong


def leaking(original):
    """Forget tokens move retain rows a little: too little for any tolerance, but it is not 0."""

    def wrong(x, weight, *rest):
        return original(x, weight, *rest) + 1e-9 * x @ weight.t()

    return wrong


def leaking_bias(original):
    def wrong(x, weight, bias, *rest):
        return original(x, weight, bias, *rest) + 1e-9 * bias

    return wrong


def raising(original):
    def wrong(*args, **options):
        raise RuntimeError("no kernel image is available")

    return wrong


def not_finite(original):
    return lambda *args, **options: original(*args, **options) + torch.tensor(float("nan"))


def of_another_shape(original):
    return lambda *args, **options: original(*args, **options)[..., :-1]


def wrong_slices(original):
    def wrong(slices, *rest):
        return original([piece._replace(decay=piece.decay + 0.5) for piece in slices], *rest)

    return wrong


FAULTS = [
    ("norm", "layer_norm", scaled, "output 0 is off by"),
    ("embedding", "embedding", gradient_only, "gradient of argument 1 is off by"),
    ("linear", "linear_in", unmasked, "gradient of argument 1 is not 0 where it is masked"),
    ("linear", "linear_in", leaking, "gradient of argument 1 is not 0 where it is masked"),
    ("mlp", "linear_gelu", leaking_bias, "gradient of argument 2 is not 0 where it is masked"),
    ("attention", "attention", raising, "RuntimeError: no kernel image is available"),
    ("mlp", "linear_gelu", not_finite, "output 0 is not finite"),
    ("linear", "linear_out", of_another_shape, "output 0 is torch.float32 (2, 20, 31), not torch.float32 (2, 20, 32)"),
    ("adamw", "prepare", wrong_slices, "weight is off by"),
]


@pytest.mark.parametrize(("op", "function", "change", "message"), FAULTS)
def test_a_broken_kernel_is_named(calls, op, function, change, message):
    with replaced({(op, "torch"): Broken(op, function, change)}):
        problems = check(calls, "torch", CPU)
    assert message in problems.pop(op) and not any(problems.values())


def test_memory_that_nobody_writes_is_noticed(calls):
    def forgetful(original):
        def wrong(ids, weight, plan, kind):
            y = original(ids, weight, plan, kind)
            return torch.cat((torch.empty_like(y[:, :1]), y[:, 1:]), dim=1)

        return wrong

    with replaced({("embedding", "torch"): Broken("embedding", "embedding", forgetful)}):
        assert "not finite" in check(calls, "torch", CPU)["embedding"]


def test_an_op_falls_back_for_the_process(calls):
    with replaced({("norm", "triton"): Broken("norm", "layer_norm", scaled)}):
        fall_back("norm", "triton")
        assert pick("norm", "triton") is pick("norm", "torch") and served("triton") == "triton (norm by torch)"
        assert check([call for call in calls if call.op == "norm"], "triton", CPU)["norm"] is None
    assert served("triton") == "triton" and served("torch") == "torch"


def test_what_has_passed_is_remembered_for_these_calls_alone(calls, tmp_path):
    passed = Passed(tmp_path, calls, "triton", CPU)
    assert not passed
    passed.keep()
    assert Passed(tmp_path, calls, "triton", CPU) and Passed(tmp_path, calls[::-1], "triton", CPU)
    assert not Passed(tmp_path, calls[1:], "triton", CPU) and not Passed(tmp_path, calls, "torch", CPU)
    passed.path.write_text("{")
    assert not passed
    passed.path.write_text(json.dumps(selfcheck.facts(CPU)))
    assert not passed


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """A device of which only the name is asked, and a package of one file."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "kernel.py").write_text("1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T0")
    monkeypatch.setattr(selfcheck, "driver", lambda: "570.1")
    monkeypatch.setattr(selfcheck, "PACKAGE", tmp_path / "package")
    monkeypatch.setenv("SGTM_TUNED", "off")
    selfcheck._code.cache_clear(), table_of.cache_clear()
    yield torch.device("cuda")
    selfcheck._code.cache_clear(), table_of.cache_clear()


def another_file(monkeypatch, folder):
    (folder / "package" / "kernel.py").write_text("2")
    selfcheck._code.cache_clear()


def another_table(monkeypatch, folder):
    (folder / "tuned.json").write_text('{"device": "T0", "entries": {}}')
    monkeypatch.setenv("SGTM_TUNED", str(folder / "tuned.json"))
    table_of.cache_clear()


CHANGES = {
    "device": lambda monkeypatch, folder: monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T1"),
    "driver": lambda monkeypatch, folder: monkeypatch.setattr(selfcheck, "driver", lambda: "570.2"),
    "torch": lambda monkeypatch, folder: monkeypatch.setattr(torch, "__version__", "0.0"),
    "triton": lambda monkeypatch, folder: monkeypatch.setattr(selfcheck, "installed", lambda package: "0.0"),
    "code": another_file,
    "tuned": another_table,
    "SGTM_LINEAR": lambda monkeypatch, folder: monkeypatch.setenv("SGTM_LINEAR", "rectangles"),
    "SGTM_ATTENTION": lambda monkeypatch, folder: monkeypatch.setenv("SGTM_ATTENTION", "flex"),
}


@pytest.mark.parametrize("fact", CHANGES)
def test_what_chooses_the_kernels_is_part_of_the_verdict(calls, tmp_path, monkeypatch, on_a_gpu, fact):
    Passed(tmp_path, calls, "triton", on_a_gpu).keep()
    assert Passed(tmp_path, calls, "triton", on_a_gpu)
    before = selfcheck.facts(on_a_gpu)
    CHANGES[fact](monkeypatch, tmp_path)
    assert [name for name, value in selfcheck.facts(on_a_gpu).items() if value != before[name]] == [fact]
    assert not Passed(tmp_path, calls, "triton", on_a_gpu)


@pytest.mark.parametrize(("dtype", "allowed", "refused"), [(torch.float32, 2e-7, 1e-4), (torch.bfloat16, 4e-3, 8e-2)])
def test_a_few_roundings_pass_and_more_do_not(calls, dtype, allowed, refused):
    (call, *_) = (call for call in calls if call.op == "norm")
    arguments = tuple(selfcheck._detached(a.to(dtype) if selfcheck._floating(a) else a) for a in call.arguments)
    calls = [call._replace(arguments=arguments)]
    for share, right in ((allowed, True), (refused, False)):
        change = Broken("norm", "layer_norm", lambda f, share=share: lambda *args: f(*args) * (1 + share))
        with replaced({("norm", "torch"): change}):
            assert (check(calls, "torch", CPU)["norm"] is None) == right


def test_adamw_leaves_what_no_slice_covers():
    def careless(original):
        def prepared(*arguments):
            step = original(*arguments)

            def wrong(tensors, *rest):
                step(tensors, *rest)
                tensors[0].weight[6] += 1e-6

            return wrong

        return prepared

    with replaced({("adamw", "torch"): Broken("adamw", "prepare", careless)}):
        assert "not updated has changed" in check([], "torch", CPU)["adamw"]
