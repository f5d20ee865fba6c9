"""What does not fit together is an error of the op, whatever the backend: a kernel would read beyond a tensor."""

from __future__ import annotations

import math

import pytest
import torch

from sgtm_kernels.attention import HeadLayout, attention
from sgtm_kernels.cross_entropy import linear_cross_entropy
from sgtm_kernels.dispatch import BACKENDS
from sgtm_kernels.embedding import embedding
from sgtm_kernels.linear import linear_in, linear_out
from sgtm_kernels.mlp import gelu, linear_gelu, swiglu
from sgtm_kernels.norm import layer_norm, rms_norm
from sgtm_kernels.plan import MaskPlan
from sgtm_kernels.testing import random_tables

PLAN = MaskPlan.uniform(random_tables(1), 0, 2, 8)  # three groups
BOUNDS = (0, 4, 6, 12)


def x(columns: int, tokens: int = 8) -> torch.Tensor:
    return torch.zeros(2, tokens, columns)


def w(*size: int) -> torch.Tensor:
    return torch.zeros(size)


HEADS, TWO_GROUPS = HeadLayout((2, 1, 1), (2, 1, 1), 3), HeadLayout((3, 1), (3, 1), 3)
IDS = torch.zeros(2, 8, dtype=torch.long)
WRONG = {
    "tokens": (lambda b: gelu(x(12, 9), PLAN, BOUNDS, b), "2 sequences of 8 tokens, the tensor of shape"),
    **{
        f"tokens of {name}": (call, "2 sequences of 8 tokens, the tensor of shape")
        for name, call in {
            "swiglu": lambda b: swiglu(x(24, 9), PLAN, BOUNDS, b),
            "linear_gelu": lambda b: linear_gelu(x(5, 9), w(12, 5), w(12), PLAN, BOUNDS, b),
            "linear_in": lambda b: linear_in(x(5, 9), w(12, 5), None, PLAN, "mlp_in", BOUNDS, b),
            "linear_out": lambda b: linear_out(x(12, 9), w(12, 5), None, PLAN, "mlp_out", BOUNDS, b),
            "rms_norm": lambda b: rms_norm(x(5, 9), w(5), 1e-5, PLAN, "norm", b),
            "attention": lambda b: attention(x(36, 9), HEADS, PLAN, scale=1.0, backend=b),
            "head": lambda b: linear_cross_entropy(x(5, 9), w(7, 5), None, torch.zeros(2, 9).long(), PLAN, 1.0, b),
        }.items()
    },
    "neurons": (lambda b: gelu(x(13), PLAN, BOUNDS, b), "must cut 13 into 1 group or the plan's 3"),
    "gates and ups": (lambda b: swiglu(x(12), PLAN, BOUNDS, b), "must cut 6 into"),
    "groups": (lambda b: gelu(x(12), PLAN, (0, 4, 12), b), "the plan's 3"),
    "first bound": (lambda b: gelu(x(12), PLAN, (1, 4, 6, 12), b), "must cut 12"),
    "linear_gelu": (lambda b: linear_gelu(x(5), w(11, 5), w(11), PLAN, BOUNDS, b), "must cut 11"),
    "rows in": (lambda b: linear_in(x(5), w(11, 5), None, PLAN, "mlp_in", BOUNDS, b), "must cut 11"),
    "rows out": (lambda b: linear_out(x(11), w(11, 5), None, PLAN, "mlp_out", BOUNDS, b), "must cut 11"),
    "projection in": (lambda b: linear_in(x(5), w(12, 5), None, PLAN, "mlp_out", BOUNDS, b), "known: attn_in, mlp_in"),
    "projection out": (lambda b: linear_out(x(12), w(12, 5), None, PLAN, "mlp", BOUNDS, b), "known: attn_out, mlp_out"),
    "kind of norm": (lambda b: rms_norm(x(5), w(5), 1e-5, PLAN, "head", b), "known: norm, final_norm, None"),
    "weight of norm": (lambda b: rms_norm(x(5), w(4), 1e-5, PLAN, "norm", b), "norm of 5 columns"),
    "bias of norm": (lambda b: layer_norm(x(5), w(5), w(6), 1e-5, PLAN, "norm", b), "norm of 5 columns"),
    "kind of table": (lambda b: embedding(IDS, w(7, 5), PLAN, "head", b), "known: embedding, position"),
    "ids": (lambda b: embedding(IDS[:1], w(7, 5), PLAN, "embedding", b), "2 sequences of 8 tokens"),
    "heads": (
        lambda b: attention(x(40), HeadLayout((2, 1, 1), (2, 1, 1), 3), PLAN, scale=1.0, backend=b),
        "40 columns",
    ),
    "groups of heads": (lambda b: attention(x(36), HeadLayout((3, 1), (3, 1), 3), PLAN, scale=1.0, backend=b), "for 3"),
    "targets": (lambda b: linear_cross_entropy(x(5), w(7, 5), None, IDS[:, :7], PLAN, 1.0, b), "[B, S]"),
    "head": (lambda b: linear_cross_entropy(x(5), w(7, 4), None, IDS, PLAN, 1.0, b), "[V, D]"),
    "columns in": (lambda b: linear_in(x(4), w(12, 5), None, PLAN, "mlp_in", BOUNDS, b), "the weight takes 5 columns"),
    "columns out": (lambda b: linear_out(x(5), w(12, 5), None, PLAN, "mlp_out", BOUNDS, b), "weight takes 12 columns"),
    "columns of linear_gelu": (lambda b: linear_gelu(x(4), w(12, 5), w(12), PLAN, BOUNDS, b), "weight takes 5 columns"),
    "bias in": (
        lambda b: linear_in(x(5), w(12, 5), w(11), PLAN, "mlp_in", BOUNDS, b),
        "12 columns, the bias has shape",
    ),
    "bias out": (lambda b: linear_out(x(12), w(12, 5), w(12), PLAN, "mlp_out", BOUNDS, b), "5 columns, the bias has"),
    "bias of linear_gelu": (lambda b: linear_gelu(x(5), w(12, 5), w(1), PLAN, BOUNDS, b), "the bias has shape (1,)"),
    "bias of the head": (lambda b: linear_cross_entropy(x(5), w(7, 5), w(6), IDS, PLAN, 1.0, b), "gives 7 columns"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit(what, backend):
    call, message = WRONG[what]
    with pytest.raises(ValueError) as caught:
        call(backend)
    assert message in str(caught.value)


@pytest.mark.parametrize("documents", [((0, 9), (9, 16)), ((0, 8),), ((0, 8), (9, 16)), ((0, 4), (4, 8), (8, 17))])
def test_documents_that_are_not_of_the_sequences(documents):
    with pytest.raises(ValueError, match="documents must cover the 16 tokens in order, none across sequences of 8"):
        MaskPlan(PLAN.tables, PLAN.label_runs, 2, 8, documents)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_the_kernels_of_attention_refuse_a_scale_that_is_not_positive(scale):
    with pytest.raises(ValueError, match="needs a positive scale"):
        attention(x(36), HEADS, PLAN, scale=scale, backend="triton")
