"""The masked ops as they are timed and checked: inputs, our call, the best public equivalents, the work of each mask.

Shapes and masks are those of sgtm_kernels/tools/shapes.py. Needs torch and `sgtm_kernels`, nothing of `sgtm`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.adamw import adamw as torch_adamw

from sgtm_kernels.adamw import Tensors, WeightSlice, prepare
from sgtm_kernels.attention import HeadLayout, attention
from sgtm_kernels.attention.public import by_flash_attn, by_flex, by_sdpa, facts_of, obstacle
from sgtm_kernels.attention.visible import Visible
from sgtm_kernels.cross_entropy import linear_cross_entropy
from sgtm_kernels.embedding import embedding
from sgtm_kernels.linear import linear_in, linear_out
from sgtm_kernels.mlp import gelu, linear_gelu, swiglu
from sgtm_kernels.norm import layer_norm, rms_norm
from sgtm_kernels.plan import MaskPlan
from sgtm_kernels.testing import poisoned_memory
from sgtm_kernels.tools.shapes import FORGET, NONE, UNLABELED, Shape
from sgtm_kernels.tools.timing import TimedCall


def forget_share(plan: MaskPlan) -> float:
    return sum(run.end - run.start for run in plan.label_runs if run.label == FORGET) / plan.tokens


@dataclass(frozen=True)
class OpCase:
    """One op on its inputs, forward and backward.

    ours     (plan, backend) -> a call of ours
    public   calls of public code that do the same unmasked
    work     plan -> (floating-point operations of matmuls, bytes moved at least) that this mask leaves to do
    results  (plan, backend, dtype) -> what our call computes from the same inputs in this dtype, by name, in memory
             that is NaN where nothing was written
    """

    ours: Callable[[MaskPlan, str], TimedCall]
    public: dict[str, TimedCall]
    work: Callable[[MaskPlan], tuple[float, float]]
    results: Callable[[MaskPlan, str, torch.dtype], dict[str, torch.Tensor]]


class Inputs:
    """Random tensors, and public code as fast as it gets: compiled on CUDA, as it is elsewhere."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.compiled = device.type == "cuda"

    def random(self, *size: int, learned: bool = True) -> torch.Tensor:
        return torch.randn(size, device=self.device, dtype=self.dtype).mul_(0.1).requires_grad_(learned)

    def integers(self, high: int, *size: int) -> torch.Tensor:
        return torch.randint(high, size, device=self.device)

    def public(
        self, name: str, function: Callable, leaves: list[torch.Tensor], dy: torch.Tensor
    ) -> dict[str, TimedCall]:
        calls = {name: both(function, leaves, dy)}
        if self.compiled:
            calls[f"{name}, compiled"] = both(torch.compile(function, fullgraph=True, dynamic=False), leaves, dy)
        return calls


def both(function: Callable[..., torch.Tensor], leaves: list[torch.Tensor], dy: torch.Tensor) -> TimedCall:
    """Forward and backward."""
    return lambda: torch.autograd.grad(function(*leaves), leaves, dy)


def differentiable(
    op: Callable[[MaskPlan, str], Callable[..., torch.Tensor]],
    leaves: dict[str, torch.Tensor],
    dy: torch.Tensor,
    public: dict[str, TimedCall],
    work: Callable[[MaskPlan], tuple[float, float]],
) -> OpCase:
    """A case of a function of `leaves`: `op(plan, backend)` is the function."""

    def ours(plan: MaskPlan, backend: str) -> TimedCall:
        return both(op(plan, backend), list(leaves.values()), dy)

    def results(plan: MaskPlan, backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in leaves.values()]
        with poisoned_memory():
            out = op(plan, backend)(*inputs)
            gradients = torch.autograd.grad(out, inputs, dy.to(out.dtype))
        return {"out": out.detach()} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}

    return OpCase(ours, public, work, results)


def _updating(tokens) -> int:
    return sum(end - start for start, end, _ in tokens.slices)


def linear(s: Shape, make: Inputs, side: str) -> OpCase:
    """The MLP's linear layers; the rows are the neurons (gates and ups of a gated one), `w_out` is input-major."""
    fold = 2 if s.gated and side == "in" else 1
    rows = fold * s.neurons
    bounds = (0, fold * (s.neurons - s.forget_neurons), rows)
    x = make.random(s.batch, s.seq_len, s.width if side == "in" else rows)
    weight = make.random(rows, s.width)
    leaves = {"x": x, "weight": weight}
    if not s.gated:
        leaves["bias"] = make.random(rows if side == "in" else s.width)
    dy = make.random(s.batch, s.seq_len, rows if side == "in" else s.width, learned=False)
    op, projection = (linear_in, "mlp_in") if side == "in" else (linear_out, "mlp_out")

    def ours(plan, backend):
        return lambda x, w, b=None: op(x, w, b, plan, projection, bounds, backend)

    def work(plan):
        dw = sum((r.end - r.start) * _updating(r.tokens) for r in plan.rows(projection, bounds)) / (rows * s.tokens)
        each = s.tokens * rows + s.tokens * s.width + rows * s.width  # operands and result of a matmul
        return (2 + dw) * 2 * s.tokens * rows * s.width, (2 + dw) * each * x.element_size()

    plain = F.linear if side == "in" else lambda x, w, b=None: F.linear(x, w.t(), b)
    return differentiable(ours, leaves, dy, {"F.linear": both(plain, list(leaves.values()), dy)}, work)


def mlp(s: Shape, make: Inputs) -> OpCase:
    bounds = (0, s.neurons - s.forget_neurons, s.neurons)
    x = make.random(s.batch, s.seq_len, s.neurons * (1 + s.gated))
    dy = make.random(s.batch, s.seq_len, s.neurons, learned=False)
    op = swiglu if s.gated else gelu

    def plain(x):
        if not s.gated:
            return F.gelu(x, approximate="tanh")
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    return differentiable(
        lambda plan, backend: lambda x: op(x, plan, bounds, backend),
        {"x": x},
        dy,
        make.public("F.silu" if s.gated else "F.gelu", plain, [x], dy),
        lambda plan: (0, (3 * x.numel() + 2 * dy.numel()) * x.element_size()),
    )


def mlp_in(s: Shape, make: Inputs) -> OpCase:
    """The linear layer before a GELU and the GELU, whose backward pass gives the bias's gradient too."""
    bounds = (0, s.neurons - s.forget_neurons, s.neurons)
    x, weight, bias = make.random(s.batch, s.seq_len, s.width), make.random(s.neurons, s.width), make.random(s.neurons)
    dy = make.random(s.batch, s.seq_len, s.neurons, learned=False)
    leaves = {"x": x, "weight": weight, "bias": bias}

    def work(plan):
        dw = sum((r.end - r.start) * _updating(r.tokens) for r in plan.rows("mlp_in", bounds)) / (s.neurons * s.tokens)
        each = s.tokens * s.neurons + s.tokens * s.width + s.neurons * s.width
        return (2 + dw) * 2 * s.tokens * s.neurons * s.width, ((2 + dw) * each + 5 * dy.numel()) * x.element_size()

    def plain(*inputs):
        return F.gelu(F.linear(*inputs), approximate="tanh")

    return differentiable(
        lambda plan, backend: lambda *inputs: linear_gelu(*inputs, plan, bounds, backend),
        leaves,
        dy,
        make.public("F.gelu of F.linear", plain, list(leaves.values()), dy),
        work,
    )


def attend(s: Shape, make: Inputs, window: int | None = None, documents: int = 1) -> OpCase:
    """Causal; a public call gets the heads as views of one projection, as ours does.

    window     keys a query sees at most; None: all of its past
    documents  of a sequence, of one length
    """
    layout, whole = s.layout, HeadLayout((s.heads,), (s.kv_heads,), s.head_dim)
    qkv = make.random(s.batch, s.seq_len, (s.heads + 2 * s.kv_heads) * s.head_dim)
    dy = make.random(s.batch, s.seq_len, s.width, learned=False)
    scale, length = s.head_dim**-0.5, s.seq_len // documents

    def cut(plan: MaskPlan) -> MaskPlan:
        pieces = tuple((t, t + length) for t in range(0, s.tokens, length))
        return MaskPlan(plan.tables, plan.label_runs, s.batch, s.seq_len, pieces if documents > 1 else None)

    def ours(plan, backend):
        plan = cut(plan)
        return lambda qkv: attention(qkv, layout, plan, scale=scale, window=window, backend=backend)

    visible = Visible(cut(MaskPlan.uniform(NONE, UNLABELED, s.batch, s.seq_len)), window)

    def library(attend):
        return both(lambda qkv: attend(*whole.split(qkv)[0], scale, visible), [qkv], dy)

    def sdpa(qkv, backend):
        with sdpa_kernel(backend):
            return by_sdpa(*whole.split(qkv)[0], scale, visible)

    public = {"SDPA": library(by_sdpa)}
    if make.compiled and visible.whole:
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
            public[f"SDPA, {name}"] = both(partial(sdpa, backend=backend), [qkv], dy)
    elif make.compiled:
        public["FlexAttention"] = library(by_flex)
    if make.compiled and not obstacle("flash_attn", facts_of(qkv.device, qkv.dtype, s.head_dim)):
        public["flash-attn"] = library(by_flash_attn)

    def work(plan):
        heads = s.heads * s.batch  # where labels change inside sequences, every head of every sequence
        if plan.whole_sequences:
            active = [sum(n for n, on in zip(layout.heads, row, strict=True) if on) for row in plan.tables.active]
            heads = sum((run.end - run.start) // s.seq_len * active[run.label] for run in plan.label_runs)
        seen = min(window or length, length)
        pairs = documents * (length * seen - seen**2 / 2)  # of queries and keys; without cuts half of the square
        return heads * 14 * pairs * s.head_dim, (3 * qkv.numel() + 3 * dy.numel()) * qkv.element_size()

    return differentiable(ours, {"qkv": qkv}, dy, public, work)


def norm(s: Shape, make: Inputs) -> OpCase:
    x, weight = make.random(s.batch, s.seq_len, s.width), make.random(s.width)
    dy = make.random(s.batch, s.seq_len, s.width, learned=False)
    leaves = {"x": x, "weight": weight}
    if not s.gated:
        leaves["bias"] = make.random(s.width)

    def ours(plan, backend):
        if s.gated:
            return lambda x, w: rms_norm(x, w, 1e-5, plan, "norm", backend)
        return lambda x, w, b: layer_norm(x, w, b, 1e-5, plan, "norm", backend)

    def plain(x, w, b=None):
        return F.rms_norm(x, (s.width,), w, 1e-5) if s.gated else F.layer_norm(x, (s.width,), w, b, 1e-5)

    public = make.public("F.rms_norm" if s.gated else "F.layer_norm", plain, list(leaves.values()), dy)
    return differentiable(ours, leaves, dy, public, lambda plan: (0, 5 * x.numel() * x.element_size()))


def embed(s: Shape, make: Inputs) -> OpCase:
    ids, weight = make.integers(s.vocab, s.batch, s.seq_len), make.random(s.vocab, s.width)
    dy = make.random(s.batch, s.seq_len, s.width, learned=False)

    def work(plan):
        rows = 2 * s.tokens + _updating(plan.joint("embedding")) + s.vocab
        return 0, rows * s.width * weight.element_size()

    return differentiable(
        lambda plan, backend: lambda w: embedding(ids, w, plan, "embedding", backend),
        {"weight": weight},
        dy,
        {"F.embedding": both(lambda w: F.embedding(ids, w), [weight], dy)},
        work,
    )


def cross_entropy(s: Shape, make: Inputs) -> OpCase:
    x, weight = make.random(s.batch, s.seq_len, s.width), make.random(s.vocab, s.width)
    targets, one = make.integers(s.vocab, s.batch, s.seq_len), torch.ones((), device=make.device)

    def ours(plan, backend):
        return lambda x, w: linear_cross_entropy(x, w, None, targets, plan, 1 / s.tokens, backend)[0]

    def plain(x, w):
        return F.cross_entropy(F.linear(x, w).flatten(0, 1).float(), targets.flatten())

    def chunked(x, w):
        return F.linear_cross_entropy(x.flatten(0, 1), w, targets.flatten()).float()

    public = make.public("F.cross_entropy", plain, [x, weight], one)
    if hasattr(F, "linear_cross_entropy"):  # from torch 2.13 on
        public["F.linear_cross_entropy"] = both(chunked, [x, weight], one)

    def work(plan):
        matmul = 2 * s.tokens * s.vocab * s.width
        dw = _updating(plan.joint("head")) / s.tokens
        return (2 + dw) * matmul, (2 * x.numel() + (2 + (dw > 0)) * weight.numel()) * x.element_size()

    return differentiable(ours, {"x": x, "weight": weight}, one, public, work)


def optimize(s: Shape, make: Inputs) -> OpCase:
    """AdamW on the MLP's weights of four layers, fp32; rows that no token of the micro-batch may update are out."""
    rows, bounds = s.neurons, (0, s.neurons - s.forget_neurons, s.neurons)
    sets = [[torch.rand(rows, s.width, device=make.device) for _ in range(4)] for _ in range(8)]
    counts = [torch.zeros((), device=make.device) for _ in sets]
    betas = (0.9, 0.95)

    def live(plan):
        return [(r.start, r.end) for r in plan.rows("mlp_in", bounds) if r.tokens.slices]

    def ours(plan, backend, sets=sets, lr=1e-6):
        tensors = [Tensors(*(t.view(-1) for t in each)) for each in sets]
        edges = [(start * s.width, end * s.width) for start, end in live(plan)]
        slices = [WeightSlice(i, start, end, 0, 0.1) for i in range(len(tensors)) for start, end in edges]
        step = prepare(slices, betas, 1e-8, backend)  # once for a live set, as in training
        return lambda: step(tensors, [10], lr, 1.0)

    def results(plan, backend, dtype):
        copies = [[t.to(torch.promote_types(dtype, torch.float32), copy=True) for t in tensors] for tensors in sets]
        with poisoned_memory():
            ours(plan, backend, copies, lr=1e-2)()
        names = ("weight", "gradient", "exp_avg", "exp_avg_sq")
        return {name: torch.stack(tensors) for name, tensors in zip(names, zip(*copies, strict=True), strict=True)}

    def plain():
        columns = [list(column) for column in zip(*sets, strict=True)]
        torch_adamw(
            *columns, [], counts, fused=True, amsgrad=False, beta1=betas[0], beta2=betas[1], lr=1e-6,
            weight_decay=0.1, eps=1e-8, maximize=False,
        )  # fmt: skip

    def work(plan):
        return 0, 7 * 4 * len(sets) * s.width * sum(end - start for start, end in live(plan))

    return OpCase(ours, {"torch AdamW, fused": plain}, work, results)


CASES: dict[str, dict[str, Callable[[Shape, Inputs], OpCase]]] = {
    "linear": {"linear_in": partial(linear, side="in"), "linear_out": partial(linear, side="out")},
    "mlp": {"activation": mlp, "linear_gelu": mlp_in},
    "attention": {
        "attention": attend,
        "attention, window": lambda s, make: attend(s, make, window=s.seq_len // 4),
        "attention, documents": partial(attend, documents=4),
    },
    "norm": {"norm": norm},
    "embedding": {"embedding": embed},
    "cross_entropy": {"linear_cross_entropy": cross_entropy},
    "adamw": {"adamw": optimize},
}
