"""Masked ops on weights as Hugging Face stores them: sgtm/integrations/ops.py."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from families import OPENED
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from sgtm.integrations import ops
from sgtm.masking.strategy import build_tables
from sgtm_kernels.plan import MAX_SLICES, MaskPlan, merge_label_runs

SEQ, OUTER = 6, 7  # tokens of a sequence, columns of the side without groups
BOUNDS = (0, 3, 5, 6)
LAYOUTS = [
    ops.Layout("mlp_in", BOUNDS),
    ops.Layout("attn_in", BOUNDS, parts=3),
    ops.Layout("mlp_out", BOUNDS),
    ops.Layout("mlp_in", BOUNDS, inputs_first=True),
    ops.Layout("attn_in", BOUNDS, parts=3, inputs_first=True),
    ops.Layout("attn_out", BOUNDS, inputs_first=True),
    ops.Layout("head", (0, 6)),
]
OVERRIDES = {
    "update.forget:bio.bio.mlp_in": 0.5, "route.retain.retain": 0.5, "active.unlabeled.code": 0.25,
    "update_joint.retain.head": 0.5,
}  # fmt: skip
TABLES = [
    build_tables(OPENED, "sgtm", "strict"),
    build_tables(OPENED, "gradient_routing"),
    build_tables(OPENED, "activation_masking", "masked", "active", OVERRIDES),
]
ORDERS = {"sorted": [2, 2, 3, 0, 1], "more runs than slices": [2, 1, 3, 0] * MAX_SLICES}


def plan_of(tables, labels) -> MaskPlan:
    return MaskPlan(tables, merge_label_runs(labels, [SEQ] * len(labels)), len(labels), SEQ)


def inputs_of(layout: ops.Layout, sequences: int, dtype=torch.float64) -> list[torch.Tensor]:
    """x, weight, bias and the gradient of the result, random."""
    torch.manual_seed(0)
    width = layout.parts * BOUNDS[-1]
    inputs, outputs = (OUTER, width) if layout.incoming else (width, OUTER)
    shape = (inputs, outputs) if layout.inputs_first else (outputs, inputs)
    shapes = [(sequences, SEQ, inputs), shape, (outputs,), (sequences, SEQ, outputs)]
    return [torch.randn(s, dtype=dtype) for s in shapes]


def weights_of(plan: MaskPlan, layout: ops.Layout, labels: list[int]) -> torch.Tensor:
    """[B, width]: what each sequence contributes to each output (in-side) or input (out-side)."""
    if layout.kind == "head":
        by_label = plan.tables.update_joint["head"]
        return torch.tensor([[by_label[label]] * 6 for label in labels], dtype=torch.float64)
    sizes = [high - low for low, high in pairwise(BOUNDS)]
    rows = [
        [plan.tables.contribution(layout.kind, label, group) for group, size in enumerate(sizes) for _ in range(size)]
        * layout.parts
        for label in labels
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tables", TABLES, ids=["sgtm", "gradient_routing", "floats"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_follow_the_tables(layout, tables, order):
    labels = ORDERS[order]
    plan = plan_of(tables, labels)
    x, weight, bias, dy = inputs_of(layout, len(labels))
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    got = ops.linear(*leaves, plan, layout)
    got.backward(dy)
    active = ops.gate(torch.ones_like(x), plan, "active", BOUNDS) if not layout.incoming else torch.ones_like(x)
    passes = ops.gate(torch.ones_like(x), plan, "passes", BOUNDS) if not layout.incoming else torch.ones_like(x)
    matrix = weight.t() if layout.inputs_first else weight
    assert torch.allclose(got, F.linear(x * active, matrix, bias), rtol=1e-12, atol=0)
    assert torch.allclose(leaves[0].grad, dy @ matrix * passes, rtol=1e-12, atol=1e-12)
    share = weights_of(plan, layout, labels)[:, None]
    left, right = (dy * share, x) if layout.incoming else (dy, x * active * share)
    dw = left.flatten(0, 1).t() @ right.flatten(0, 1)
    dw = dw.t() if layout.inputs_first else dw
    assert torch.allclose(leaves[1].grad, dw, rtol=1e-10, atol=1e-10)
    along = 1 if layout.incoming == layout.inputs_first else 0
    learning = share.flatten(0, 1).any(0)
    assert not leaves[1].grad.index_select(along, (~learning).nonzero().flatten()).any()
    if layout.incoming:
        db = (dy * share).sum((0, 1))
    else:
        by_label = tables.update_joint[f"{layout.kind}_bias"]
        db = (dy * torch.tensor([by_label[label] for label in labels], dtype=dy.dtype)[:, None, None]).sum((0, 1))
    assert torch.allclose(leaves[2].grad, db, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_value_and_dx_are_those_of_the_module(layout):
    plan = plan_of(build_tables(OPENED, "none"), [2, 0, 1])
    x, weight, bias, dy = inputs_of(layout, 3, torch.float32)
    module = Conv1D(*reversed(weight.shape)) if layout.inputs_first else torch.nn.Linear(*reversed(weight.shape))
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    results = []
    for call in (module, lambda x: ops.linear(x, module.weight, module.bias, plan, layout)):
        leaf = x.clone().requires_grad_()
        result = call(leaf)
        result.backward(dy)
        results.append((result, leaf.grad))
    for plain, masked in zip(*results, strict=True):
        assert torch.equal(plain, masked)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_parameter_itself_is_saved(layout):
    """ZeRO-3 frees what a view would hold."""
    x, weight, bias, _ = inputs_of(layout, 3)
    weight, saved = torch.nn.Parameter(weight), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        ops.linear(x.requires_grad_(), weight, bias.requires_grad_(), plan_of(TABLES[0], [2, 0, 1]), layout)
    assert len(saved) == 2 and any(tensor is weight for tensor in saved)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_autocast_computes_in_its_dtype_and_keeps_that_of_the_weights(layout):
    plan = plan_of(TABLES[0], [2, 0, 1])
    tensors = inputs_of(layout, 3, torch.float32)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
    with torch.autocast("cpu", torch.bfloat16):
        result = ops.linear(*leaves, plan, layout)
    result.backward(tensors[3].bfloat16())
    assert result.dtype == torch.bfloat16 and {leaf.grad.dtype for leaf in leaves} == {torch.float32}
    exact = [tensor.double().requires_grad_() for tensor in tensors[:3]]
    ops.linear(*exact, plan, layout).backward(tensors[3].double())
    for leaf, right in zip(leaves, exact, strict=True):
        assert (leaf.grad - right.grad).abs().max() <= 0.02 * right.grad.abs().max()


def test_a_gate_of_ones_is_no_work():
    x = torch.randn(3, SEQ, 6)
    assert ops.gate(x, plan_of(build_tables(OPENED, "sgtm"), [2, 3, 0]), "route", BOUNDS) is x


@pytest.mark.parametrize("shape", [(5, SEQ, 4), (5, SEQ, 3, 4)])
@pytest.mark.parametrize("kind", ["norm", "final_norm"])
def test_the_scale_of_a_norm_learns_from_its_tokens(kind, shape):
    labels = ORDERS["sorted"]
    plan = plan_of(TABLES[2], labels)
    torch.manual_seed(0)
    x, dy = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    result = ops.scale(x, weight, plan, kind)
    result.backward(dy)
    by_label = TABLES[2].update_joint[kind]
    share = torch.tensor([by_label[label] for label in labels], dtype=x.dtype).view(-1, *[1] * (x.dim() - 1))
    assert torch.equal(result, weight * x) and torch.equal(x.grad, dy * weight)
    assert torch.allclose(weight.grad, (dy * x * share).flatten(0, -2).sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-5, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_rms_norm_learns_from_its_tokens(dtype, eps):
    """Value and dX are those of nn.RMSNorm to the bit."""
    labels, plan = ORDERS["sorted"], plan_of(TABLES[2], ORDERS["sorted"])
    torch.manual_seed(0)
    x, dy = torch.randn(5, SEQ, 4).to(dtype), torch.randn(5, SEQ, 4).to(dtype)
    norm = torch.nn.RMSNorm(4, eps).to(dtype)
    torch.nn.init.normal_(norm.weight)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = norm.weight.detach().clone().requires_grad_()
    result, expected = ops.rms_norm(ours, weight, eps, plan, "norm"), norm(theirs)
    result.backward(dy)
    expected.backward(dy)
    assert torch.equal(result, expected) and torch.equal(ours.grad, theirs.grad)
    share = torch.tensor([TABLES[2].update_joint["norm"][label] for label in labels]).view(-1, 1, 1)
    wide = F.rms_norm(x.double(), (4,), None, torch.finfo(dtype).eps if eps is None else eps)
    exact = (dy.double() * wide * share).flatten(0, -2).sum(0)
    assert (weight.grad - exact).abs().max() <= (0.01 if dtype is torch.bfloat16 else 1e-6) * exact.abs().max()
    assert 0 < share.sum() < len(labels)


def test_an_rms_norm_that_no_token_may_update_has_a_gradient_of_exact_zeros():
    weight = torch.ones(4, requires_grad=True)
    x = torch.randn(3, SEQ, 4)
    ops.rms_norm(x, weight, 1e-5, plan_of(TABLES[0], [2, 2, 3]), "norm").sum().backward()
    assert torch.equal(weight.grad, torch.zeros(4))


def test_a_tensor_of_another_micro_batch_is_refused():
    with pytest.raises(ValueError, match="the plan is of 3 sequences of 6 tokens"):
        ops.scale(torch.ones(3, SEQ + 1, 4), torch.ones(4), plan_of(TABLES[0], [0, 1, 2]), "norm")
