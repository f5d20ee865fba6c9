"""What a compiled graph of the `torch` backend is made of: its ops, and the signature that it depends on."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from sgtm_kernels.attention import HeadLayout, attention
from sgtm_kernels.attention.compiled import visible_attention, visible_attention_backward
from sgtm_kernels.dispatch import load
from sgtm_kernels.graph import factors
from sgtm_kernels.linear import linear_in, linear_out
from sgtm_kernels.linear.compiled import joint_sum, masked_product, row_sum
from sgtm_kernels.mlp import gelu, linear_gelu, swiglu
from sgtm_kernels.norm import layer_norm, rms_norm
from sgtm_kernels.plan import JOINT_KINDS, PROJECTIONS, MaskPlan, Run, Tables
from sgtm_kernels.signature import Signature
from sgtm_kernels.testing import random_plan, random_tables

BATCH, SEQ_LEN, BOUNDS = 4, 6, (0, 5, 9, 12)
LAYOUT = HeadLayout((2, 0, 1), (2, 0, 1), 4)


def draw(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def plan_number(seed: int, layout: str = "tokens", documents: bool = False) -> MaskPlan:
    return random_plan(seed, random_tables(seed), layout, BATCH, SEQ_LEN, documents=documents)


X, ROWS = (BATCH, SEQ_LEN, 8), (BATCH, SEQ_LEN, 12)
HEADS = ((BATCH, 2, SEQ_LEN, 4),) * 3
ANGLES = torch.arange(SEQ_LEN * 2.0).view(SEQ_LEN, 2).repeat(1, 2)
OPS = {
    factors: ([X], [3]),
    masked_product: ([ROWS, X], ["mlp_in", BOUNDS]),
    row_sum: ([ROWS], ["mlp_in", BOUNDS]),
    joint_sum: ([X], ["norm"]),
    visible_attention: (HEADS, [0.5, 3]),
    visible_attention_backward: ([X, *HEADS], [0.5, None]),
}
CALLS = {
    "gelu": ([ROWS], lambda x, plan: gelu(x, plan, BOUNDS)),
    "linear_gelu": ([X, (12, 8), (12,)], lambda x, w, b, plan: linear_gelu(x, w, b, plan, BOUNDS)),
    "swiglu": ([(BATCH, SEQ_LEN, 24)], lambda x, plan: swiglu(x, plan, BOUNDS)),
    "linear_in": ([X, (12, 8)], lambda x, w, plan: linear_in(x, w, None, plan, "attn_in", BOUNDS)),
    "linear_out": ([ROWS, (12, 8), (8,)], lambda x, w, b, plan: linear_out(x, w, b, plan, "attn_out", BOUNDS)),
    "attention": (
        [(BATCH, SEQ_LEN, 36)],
        lambda x, plan: attention(x, LAYOUT, plan, scale=0.5, rotary=(ANGLES.cos(), ANGLES.sin())),
    ),
    "window": ([(BATCH, SEQ_LEN, 36)], lambda x, plan: attention(x, LAYOUT, plan, scale=0.5, window=3)),
    "widest_window": (
        [(BATCH, SEQ_LEN, 36)],
        lambda x, plan: attention(x, LAYOUT, plan, scale=0.5, window=SEQ_LEN - 1),
    ),
    "layer_norm": ([X, (8,), (8,)], lambda x, w, b, plan: layer_norm(x, w, b, 1e-5, plan, "norm")),
    "rms_norm": ([X, (8,)], lambda x, w, plan: rms_norm(x, w, 1e-5, plan, "norm")),
}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name())
@pytest.mark.parametrize("layout", ["sorted", "tokens"])
def test_opcheck(op, layout):
    sizes, numbers = OPS[op]
    opcheck(op, [*(draw(*size) for size in sizes), plan_number(3, layout, documents=True).handle, *numbers])


def test_factors_may_be_written_over():
    """As the compiler does with the result of an op; what the plan keeps stays."""
    x, plan = draw(*X), plan_number(3)
    first = factors(x, plan.handle, 3)
    expected = first.clone()
    first.fill_(torch.nan)
    assert torch.equal(factors(x, plan.handle, 3), expected)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_one_graph_serves_every_plan(name, documents):
    """Any factors, not 0 and 1 alone; gradients as of the op outside of a graph, but for rounding."""
    load("torch")
    sizes, function = CALLS[name]
    inputs = [draw(*size).requires_grad_() for size in sizes]
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=counter)
    signatures = set()
    for seed, layout in enumerate(("tokens", "sorted", "ragged")):
        plan = plan_number(seed, layout, documents)
        signatures.add(plan.signature)
        for results in zip(*(results_of(way, inputs, plan) for way in (compiled, function)), strict=True):
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1 == len(signatures)


def results_of(function, inputs: list[torch.Tensor], plan: MaskPlan) -> tuple[torch.Tensor, ...]:
    y = function(*inputs, plan)
    return y, *torch.autograd.grad(y, inputs, torch.ones_like(y) + y.detach())


ONES = Tables(
    ("a", "b"),
    ("retain", "es"),
    *[((1.0, 1.0),) * 2] * 2,
    dict.fromkeys(PROJECTIONS, ((1.0, 1.0),) * 2),
    dict.fromkeys(JOINT_KINDS, (1.0, 1.0)),
)
HALF = ((1.0, 1.0), (0.5, 1.0))  # for label b
PLAIN = Signature(*[False] * 7)
IN, OUT = {"attn_in": True, "mlp_in": True}, {"attn_out": True, "mlp_out": True}


@pytest.mark.parametrize(
    ("changes", "masked"),
    [
        ({}, {}),
        ({"active": HALF}, {"outputs": True}),
        ({"active": ((1.0, 1.0), (0.0, 1.0))}, {"outputs": True, **IN, **OUT}),
        ({"route": HALF}, {"outputs": True}),
        ({"route": ((1.0, 1.0), (0.0, 1.0))}, {"outputs": True, **IN}),
        *(({"update": {**ONES.update, part: HALF}}, {part: True}) for part in PROJECTIONS),
        *(
            ({"update_joint": {**ONES.update_joint, kind: (1.0, 0.5)}}, {kind.removesuffix("_bias"): True})
            for kind in ("attn_out_bias", "mlp_out_bias", "norm")
        ),
        *(({"update_joint": {**ONES.update_joint, kind: (1.0, 0.5)}}, {}) for kind in JOINT_KINDS[3:]),
    ],
)
def test_signature(changes, masked):
    tables = replace(ONES, **changes)
    for label, documents in product((0, 1), (None, ((0, 3), (3, 6)))):
        plan = MaskPlan(tables, (Run(label, 0, 6),), 1, 6, documents)
        expected = masked if label == 1 else {}
        assert plan.signature == PLAIN._replace(**expected, documents=documents is not None)
