"""The Triton backend's ops in torch's dispatcher: true schemas, shapes without data, gradients; whole graphs."""

from __future__ import annotations

import gc
import pickle
import weakref
from copy import copy, deepcopy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from sgtm_kernels.attention import HeadLayout, attention
from sgtm_kernels.cross_entropy import linear_cross_entropy
from sgtm_kernels.dispatch import load
from sgtm_kernels.embedding import embedding
from sgtm_kernels.linear import linear_in, linear_out
from sgtm_kernels.mlp import gelu, linear_gelu, swiglu
from sgtm_kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from sgtm_kernels.plan import _PLANS, MaskPlan, plan_of
from sgtm_kernels.testing import random_plan, random_tables

BATCH, SEQ_LEN = 4, 6
TABLES = random_tables(1)
LAYOUT = HeadLayout((2, 0, 1), (2, 0, 1), 4)
BOUNDS = (0, 5, 9, 12)


def draw(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def turned(x, plan):
    angles = torch.arange(SEQ_LEN * 4.0).view(SEQ_LEN, 4)
    return attention(x, LAYOUT, plan, scale=0.5, rotary=(angles.cos(), angles.sin()), backend="triton")


def loss(x, w, b, plan):
    targets = torch.arange(BATCH * SEQ_LEN).view(BATCH, SEQ_LEN) % 7
    return linear_cross_entropy(x, w, b, targets, plan, 0.25, "triton")[0]


# name: (inputs, function of (inputs, plan))
CALLS = {
    "gelu": ([(BATCH, SEQ_LEN, 12)], lambda x, plan: gelu(x, plan, BOUNDS, "triton")),
    "linear_gelu": (
        [(BATCH, SEQ_LEN, 8), (12, 8), (12,)],
        lambda x, w, b, plan: linear_gelu(x, w, b, plan, BOUNDS, "triton"),
    ),
    "swiglu": ([(BATCH, SEQ_LEN, 24)], lambda x, plan: swiglu(x, plan, BOUNDS, "triton")),
    "linear_in": (
        [(BATCH, SEQ_LEN, 8), (12, 8), (12,)],
        lambda x, w, b, plan: linear_in(x, w, b, plan, "mlp_in", BOUNDS, "triton"),
    ),
    "linear_in, overwrite": (
        [(BATCH, SEQ_LEN, 8), (12, 8)],
        lambda x, w, plan: linear_in(x, w, None, plan, "mlp_in", BOUNDS, "triton", overwrite=True).sin(),
    ),
    "linear_out": (
        [(BATCH, SEQ_LEN, 12), (12, 8), (8,)],
        lambda x, w, b, plan: linear_out(x, w, b, plan, "mlp_out", BOUNDS, "triton"),
    ),
    "attention": (
        [(BATCH, SEQ_LEN, 36)],
        lambda x, plan: attention(x, LAYOUT, plan, scale=0.5, window=3, backend="triton"),
    ),
    "attention, rotary": ([(BATCH, SEQ_LEN, 36)], turned),
    "layer_norm": (
        [(BATCH, SEQ_LEN, 8), (8,), (8,)],
        lambda x, w, b, plan: layer_norm(x, w, b, 1e-5, plan, "norm", "triton"),
    ),
    "rms_norm": ([(BATCH, SEQ_LEN, 8), (8,)], lambda x, w, plan: rms_norm(x, w, 1e-5, plan, "norm", "triton")),
    "add_layer_norm": (
        [(BATCH, SEQ_LEN, 8), (BATCH, SEQ_LEN, 8), (8,), (8,)],
        lambda x, r, w, b, plan: sum(add_layer_norm(x, r, w, b, 1e-5, plan, "norm", "triton")),
    ),
    "add_rms_norm": (
        [(BATCH, SEQ_LEN, 8), (BATCH, SEQ_LEN, 8), (8,)],
        lambda x, r, w, plan: sum(add_rms_norm(x, r, w, 1e-5, plan, "norm", "triton")),
    ),
    "embedding": (
        [(9, 8)],
        lambda w, plan: embedding(torch.arange(24).view(BATCH, SEQ_LEN) % 9, w, plan, "embedding", "triton"),
    ),
    "cross_entropy": ([(BATCH, SEQ_LEN, 8), (7, 8), (7,)], loss),
}
calls = pytest.mark.parametrize("name", CALLS)


@pytest.fixture(autouse=True, scope="module")
def loaded():
    load("triton")


def plan_number(seed: int, layout: str = "tokens") -> MaskPlan:
    return random_plan(seed, TABLES, layout, BATCH, SEQ_LEN)


def inputs_of(name: str) -> list[torch.Tensor]:
    return [draw(*size).requires_grad_() for size in CALLS[name][0]]


class Recorder(TorchDispatchMode):
    """The calls of our ops, those of the backward pass among them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "sgtm":
            copies = [a.detach().clone() if isinstance(a, torch.Tensor) and a.dim() else a for a in args]
            self.calls.append((function, copies))
        return function(*args, **(kwargs or {}))


@calls
def test_opcheck(name, monkeypatch):
    """Every op as it is called while a graph is captured, forward and backward."""
    plan, inputs = plan_number(3), inputs_of(name)
    with monkeypatch.context() as capture, Recorder() as recorder:
        capture.setattr(torch.compiler, "is_compiling", lambda: True)
        CALLS[name][1](*inputs, plan).sum().backward()
    assert len(recorder.calls) == {"cross_entropy": 1, "linear_gelu": 4}.get(name, 2)
    for function, args in recorder.calls:
        if "backward" not in function.name():
            args = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        opcheck(function, args)


@calls
def test_the_dispatcher_sees_no_op_where_no_graph_is_captured(name):
    with Recorder() as recorder:
        CALLS[name][1](*inputs_of(name), plan_number(3)).sum().backward()
    assert not recorder.calls


@calls
def test_one_graph_serves_every_plan(name):
    """No graph break, no new graph for the next batch's runs, and the bits of the ops as they are."""
    function, inputs = CALLS[name][1], inputs_of(name)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for seed, layout in enumerate(("tokens", "sorted", "uniform", "ragged")):
        plan = plan_number(seed, layout)
        results = [
            (y, *torch.autograd.grad(y, inputs, torch.ones_like(y)))
            for y in (version(*inputs, plan) for version in (compiled, function))
        ]
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain, rtol=0, atol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("version", ["as it is", "compiled"])
@calls
def test_the_graph_of_autograd_has_the_plan(name, version):
    function, inputs = CALLS[name][1], inputs_of(name)
    if version == "compiled":
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    y = function(*inputs, plan_number(3))
    gc.collect()
    y.sum().backward()
    assert all(x.grad is not None for x in inputs)


def test_a_plan_lives_no_longer_than_its_handle():
    plan = plan_number(3)
    before, tensors = len(_PLANS), weakref.ref(plan.factors([(1.0,) * 4], torch.device("cpu")))
    handle = plan.handle
    assert plan_of(handle).label_runs == plan.label_runs
    del plan
    assert plan_of(handle) is not None and tensors() is not None
    del handle
    assert len(_PLANS) == before - 1 and tensors() is None


@pytest.mark.parametrize("again", [copy, deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_a_copy_of_a_plan_outlives_it(again):
    plan = random_plan(2, TABLES, "ragged", BATCH, SEQ_LEN, documents=True)
    wanted = plan.tables, plan.label_runs, plan.batch, plan.seq_len, plan.documents
    twin = again(plan)
    del plan
    lookup = plan_of(twin.handle)
    assert (lookup.tables, lookup.label_runs, lookup.batch, lookup.seq_len, lookup.documents) == wanted
    assert lookup.label_runs == twin.label_runs and twin.documents is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@calls
def test_a_cuda_graph_replays_the_op(name):
    """Nothing waits for the device or allocates by what is in it. The plan's tensors are made before the capture."""
    function, inputs, plan = CALLS[name][1], inputs_of(name), plan_number(3)

    def step():
        y = function(*inputs, plan)
        return y, *torch.autograd.grad(y, inputs, torch.ones_like(y))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in inputs:
            x.neg_()
    graph.replay()
    for replayed, direct in zip(captured, step(), strict=True):
        assert torch.equal(replayed, direct)
