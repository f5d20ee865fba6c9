"""Which backend runs: named ones never fall back, every op has the same functions in each."""

import inspect
import sys
from importlib import import_module

import pytest
import torch

from sgtm_kernels.dispatch import (
    ALGORITHMS,
    BACKENDS,
    CAPTURED,
    FALLBACK,
    OPS,
    algorithm,
    explain,
    load,
    module_name,
    named,
    pick,
    resolve,
    unusable,
)
from sgtm_kernels.plan import MaskPlan
from sgtm_kernels.testing import random_tables

COMPOSED = ("adamw", "kept_losses")  # whatever the backend: of other functions of its op, or about the plan alone


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv("SGTM_KERNELS", raising=False)


@pytest.mark.parametrize(
    ("name", "environment", "expected"),
    [
        ("auto", None, FALLBACK),
        ("auto", "", FALLBACK),
        ("auto", "auto", FALLBACK),
        ("auto", "reference", "reference"),
        ("reference", None, "reference"),
        ("reference", "auto", "reference"),
        ("torch", "torch", "torch"),
        ("runs", None, "torch"),
        ("torch", "runs", "torch"),
    ],
)
def test_resolve(monkeypatch, name, environment, expected):
    if environment is not None:
        monkeypatch.setenv("SGTM_KERNELS", environment)
    assert resolve(name, device="cpu") == expected
    assert named(name) == (expected == "reference" or name in ("torch", "runs"))


def test_a_contradiction_is_an_error(monkeypatch):
    monkeypatch.setenv("SGTM_KERNELS", "torch")
    with pytest.raises(ValueError, match=r"'reference', but SGTM_KERNELS is 'torch'"):
        resolve("reference")


def test_unknown_backends_are_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"the kernel backend is 'run'; it takes auto, reference, torch or triton"):
        resolve("run")
    monkeypatch.setenv("SGTM_KERNELS", "tritn")
    with pytest.raises(ValueError, match=r"SGTM_KERNELS is 'tritn'; it takes auto"):
        resolve("auto")


def test_triton_by_name_needs_a_device_or_the_interpreter(monkeypatch):
    assert unusable("triton") is None and resolve("triton") == "triton"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"'triton' was requested, but there is no CUDA device"):
        resolve("triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "not installed" in unusable("triton") and resolve("auto", device="cpu") == FALLBACK


def test_auto_is_triton_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert explain("auto") == ("torch", "the default where Triton is interpreted")
    monkeypatch.delenv("TRITON_INTERPRET")
    for dtype in (torch.bfloat16, torch.float32):
        assert explain("auto", dtype) == explain("auto", dtype, "cuda") == ("triton", "the default on CUDA")
    assert explain("auto", device="cpu") == ("torch", "the default on a CPU")
    assert explain("reference") == ("reference", "named by the config")
    monkeypatch.setenv("SGTM_KERNELS", "torch")
    assert explain("auto") == ("torch", "named by SGTM_KERNELS")
    monkeypatch.delenv("SGTM_KERNELS")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert explain("auto")[1].startswith("the default where Triton is not installed")


@pytest.mark.parametrize(("op", "backend"), [("linear", "auto"), ("matmul", "torch"), ("linear", "cuda")])
def test_pick_refuses_what_does_not_exist(op, backend):
    with pytest.raises(ValueError, match="no backend"):
        pick(op, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_backends_have_the_functions_of_their_op(op, backend):
    """Every public op function exists in every backend, and reaches it: no backend is another in disguise."""
    package, module = import_module(f"sgtm_kernels.{op}"), pick(op, backend)
    functions = [name for name in package.__all__ if inspect.isfunction(getattr(package, name))]
    functions = [name for name in functions if name not in COMPOSED]
    assert functions
    for name in functions:
        assert getattr(module, name).__module__ == module_name(op, backend)


@pytest.mark.parametrize("op", CAPTURED)
def test_a_captured_op_is_called_like_the_others(op):
    package, runs, module = (import_module(f"sgtm_kernels.{op}{name}") for name in ("", ".pytorch", ".compiled"))
    for name in package.__all__:
        if inspect.isfunction(getattr(package, name)):
            ours, theirs = (list(inspect.signature(getattr(m, name)).parameters) for m in (module, runs))
            assert ours == theirs, f"{op}.{name}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_op_runs_in_the_backend_it_is_given(monkeypatch, backend):
    from sgtm_kernels.mlp import gelu

    called = []
    monkeypatch.setattr(pick("mlp", backend), "gelu", lambda *args: called.append(backend))
    plan = MaskPlan.uniform(random_tables(0), 0, 1, 2)
    gelu(torch.zeros(1, 2, 4), plan, (0, 2, 3, 4), backend)
    assert called == [backend]


def test_triton_in_its_interpreter_is_not_taken_in_bf16(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("triton", torch.float32) == "triton"
    with pytest.raises(ValueError, match="Triton's interpreter gives wrong results in bf16; use fp32"):
        resolve("triton", torch.bfloat16)


@pytest.mark.parametrize("variable", ALGORITHMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unknown_algorithm_is_an_error_of_every_backend(variable, backend, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for known in ALGORITHMS[variable]:
        monkeypatch.setenv(variable, known)
        load(backend)
        assert algorithm(variable) == known
    monkeypatch.setenv(variable, "bogus")
    with pytest.raises(
        ValueError,
        match=f"^{variable} is 'bogus'; it takes {', '.join(ALGORITHMS[variable][:-1])} or {ALGORITHMS[variable][-1]}$",
    ):
        load(backend)
