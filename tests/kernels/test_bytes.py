"""How many bytes the PyTorch path moves: inputs and outputs of every torch op in a forward and backward pass.

The budget of each op is in bytes per element of its input (of its logits), in bf16, where a number takes 2. Views move
nothing, `out=` is written and not read, and a broadcast tensor counts once.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sgtm_kernels.attention import pytorch as attention_pytorch
from sgtm_kernels.attention.heads import cut, heads
from sgtm_kernels.attention.op import HeadLayout
from sgtm_kernels.cross_entropy import linear_cross_entropy
from sgtm_kernels.mlp import gelu, swiglu
from sgtm_kernels.norm import layer_norm, rms_norm
from sgtm_kernels.plan import MaskPlan
from sgtm_kernels.testing import forward_backward
from sgtm_kernels.tools.shapes import Shape, plans

pytestmark = pytest.mark.cpu
BATCH, SEQ_LEN, WIDTH, VOCAB = 4, 64, 256, 1024
TOKENS = BATCH * SEQ_LEN


class Bytes(TorchDispatchMode):
    """Counts what moves while it is active."""

    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or "empty" in name or name in ("detach", "lift_fresh", "_unsafe_view"):
            return out
        written = {a.name for a in func._schema.arguments if a.kwarg_only and a.alias_info is not None}
        read = [args, {key: value for key, value in kwargs.items() if key not in written}]
        if name in ("zero_", "fill_", "copy_"):
            read = [args[1:]]
        if name in ("gather", "scatter_add_"):  # as many elements as there are indices
            tensors = [x for x in args if isinstance(x, torch.Tensor) and x.dtype is torch.int64]
        else:
            tensors = [x for x in tree_leaves([read, out]) if isinstance(x, torch.Tensor)]
        self.moved += sum(map(size, tensors))
        return out


def size(x: torch.Tensor) -> int:
    elements = 1
    for n, stride in zip(x.shape, x.stride(), strict=True):
        elements *= n if stride else 1
    return elements * x.element_size()


def moved(function, *inputs: torch.Tensor) -> int:
    """Bytes of a forward and backward pass; not those of the sum that the gradient comes from."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = tree_leaves(function(*leaves))  # what is made once is there
    dys = [torch.ones_like(out) for out in outputs]
    torch.autograd.backward(outputs, dys)
    with Bytes() as counted:
        outputs = tree_leaves(function(*leaves))
    with counted:
        torch.autograd.grad(outputs, leaves, dys)
    return counted.moved


def data(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


SHAPE = Shape(BATCH, SEQ_LEN, WIDTH, 32, 32, 4 * WIDTH, VOCAB, 2, 64)
PLANS = plans(SHAPE)
BOUNDS = (0, 4 * WIDTH - 64, 4 * WIDTH)
COS_SIN = tuple(data(SEQ_LEN, 4, seed=i).float().repeat(1, 2) for i in (8, 9))


def rotated(plan: MaskPlan):
    """The pieces of the projection, of which queries and keys are turned: attention itself is not counted."""
    pieces_of = cut(HeadLayout((16,), (8,), 8), True, True, torch.device("cpu"))
    return lambda x: heads(x, *attention_pytorch._tables(COS_SIN, x.dtype, plan), plan, pieces_of)


def losses(plan: MaskPlan):
    targets = torch.randint(VOCAB, (BATCH, SEQ_LEN), generator=torch.Generator().manual_seed(3))
    return lambda x, weight: linear_cross_entropy(x, weight, None, targets, plan, 1.0)[0]


MASKS = ("nothing masked", "25 % forget", "pure forget")
WEIGHTS = [(WIDTH,), (WIDTH,)]
X, WEIGHT = (BATCH, SEQ_LEN, WIDTH), (WIDTH,)
# name: op, shapes of its inputs, and the budget under each of MASKS
CASES = {
    "layer_norm": (lambda p: lambda *x: layer_norm(*x, 1e-5, p, "norm"), [X, WEIGHT, WEIGHT], (11, 33, 11)),
    "rms_norm": (lambda p: lambda *x: rms_norm(*x, 1e-5, p, "norm"), [X, WEIGHT], (55, 50, 35)),
    "gelu": (lambda p: lambda x: gelu(x, p, BOUNDS), [(BATCH, SEQ_LEN, 4 * WIDTH)], (10.5, 10.5, 10.5)),
    "swiglu": (lambda p: lambda x: swiglu(x, p, BOUNDS), [(BATCH, SEQ_LEN, 8 * WIDTH)], (16.5, 16.5, 16.5)),
    "rotate": (rotated, [X], (20.2, 20.2, 20.2)),
    "cross_entropy": (losses, [(BATCH, SEQ_LEN, 8), (VOCAB, 8)], (27, 27, 26)),
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_within_budget(name):
    op, shapes, budgets = CASES[name]
    inputs = [data(*shape, seed=i) for i, shape in enumerate(shapes)]
    elements = TOKENS * VOCAB if name == "cross_entropy" else inputs[0].numel()
    traffic = {mask: moved(op(PLANS[mask]), *inputs) / elements for mask in MASKS}
    assert all(traffic[mask] <= budget for mask, budget in zip(MASKS, budgets, strict=True)), traffic


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_a_group_whose_factor_is_1_costs_no_pass(name):
    """Retain tokens: the few forget neurons are set to 0, within the budget of what masks nothing."""
    op, shapes, (budget, *_) = CASES[name]
    inputs = [data(*shape, seed=i) for i, shape in enumerate(shapes)]
    assert PLANS["pure retain"].signature.outputs
    assert moved(op(PLANS["pure retain"]), *inputs) / inputs[0].numel() <= budget


def test_rms_norm_takes_torchs_fused_kernels_where_there_are_some():
    """As on a GPU, with kernels for the CPU that stand in for them; one call where nothing is masked."""
    x, weight = data(BATCH, SEQ_LEN, WIDTH), data(WIDTH, seed=1)

    def forward(x, shape, weight, eps):
        rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        return (x * rstd * weight).to(x.dtype), rstd

    def backward(dy, x, shape, rstd, weight, wanted):
        dn, n = dy.float() * weight, x * rstd
        dx = ((dn - n * (dn * n).mean(-1, keepdim=True)) * rstd).to(x.dtype)
        dw = (dy * n).flatten(0, -2).sum(0).to(weight.dtype)
        return dx if wanted[0] else None, dw if wanted[1] else None

    budgets = {"nothing masked": 10.1, "25 % forget": 13.5, "pure forget": 10.1}
    for mask, budget in budgets.items():

        def op(x, weight, mask=mask):
            return rms_norm(x, weight, 1e-5, PLANS[mask], "norm")

        eager = forward_backward(op, x, weight)
        with torch.library._scoped_library("aten", "IMPL") as library:
            library.impl("_fused_rms_norm", forward, "CPU")
            library.impl("_fused_rms_norm_backward", backward, "CPU")
            fused = forward_backward(op, x, weight)
            assert moved(op, x, weight) / x.numel() <= budget
        for mine, theirs in zip(fused, eager, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


def test_cos_and_sin_are_cast_once_for_all_layers():
    first, again = (attention_pytorch._tables(COS_SIN, torch.bfloat16, PLANS["unmasked"]) for _ in range(2))
    assert first is again and first[0].dtype is torch.bfloat16
    other = tuple(2 * table for table in COS_SIN)
    assert torch.equal(attention_pytorch._tables(other, torch.float32, PLANS["unmasked"])[1], other[1][:, None, :4])
