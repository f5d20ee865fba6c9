"""Masked ops on weights as Hugging Face and torchtitan store them.

The value is bit for bit that of the module which the op replaces; dX is the plain one, but for `active` and `route`,
which multiply the input of an out-side projection (the heads' outputs, the neurons' activations). A gradient has the
full shape of its parameter, with exact zeros where no token may update it.

Why not the ops of `sgtm_kernels` throughout: its linear layers have a group's weights in rows, which `o_proj`,
`down_proj` and GPT-2's `c_attn` and `c_fc` have in columns, and its RMSNorm rounds differently from Hugging Face's in
bf16. Both linear layers here are one op over the same slices of rows and tokens (`weight_gradient`): labels are those
of sequences, so that masks are a few ranges, for which the Triton kernels have nothing to add. LayerNorm and embedding
are the kernels' own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from sgtm_kernels.linear.pytorch import token_sum, weight_gradient
from sgtm_kernels.plan import MaskPlan, RowWork, table_on


@dataclass(frozen=True)
class Layout:
    """A linear layer: what masks it, and how its weight is stored.

    kind          the projection; `head` for the LM head, whose rows all have the joint kind `head`
    bounds        group boundaries in one part of the outputs (in-side) or in the inputs (out-side)
    parts         how often the groups follow one another in the outputs
    inputs_first  whether the weight is [in, out] (`Conv1D`), or [out, in]
    """

    kind: str
    bounds: tuple[int, ...]
    parts: int = 1
    inputs_first: bool = False

    @property
    def incoming(self) -> bool:
        return not self.kind.endswith("_out")

    def work(self, plan: MaskPlan) -> tuple[RowWork, ...]:
        """Which tokens update which outputs (in-side) or inputs (out-side); made once for a plan."""
        return plan.cached(("work", self), lambda: self._work(plan))

    def _work(self, plan: MaskPlan) -> tuple[RowWork, ...]:
        if self.kind == "head":
            return (RowWork(0, self.bounds[-1], plan.joint("head")),)
        one = plan.rows(self.kind, self.bounds)
        if len(one) == 1:
            return (one[0]._replace(end=self.parts * self.bounds[-1]),)
        starts = range(0, self.parts * self.bounds[-1], self.bounds[-1])
        return tuple(RowWork(start + low, start + high, tokens) for start in starts for low, high, tokens in one)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: MaskPlan, layout: Layout) -> Tensor:
    """x [B, S, in] through a masked linear layer -> [B, S, out], in the dtype of autocast where that is on."""
    plan.check(x)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Linear.apply(x, weight, bias, plan, layout)


def gate(x: Tensor, plan: MaskPlan, table: str, bounds: tuple[int, ...]) -> Tensor:
    """x [B, S, in] times `active` or `passes` of its sequence's label and its column's group; x where all are 1."""
    factors = plan.tables.columns[table]
    if not plan.masks(factors):
        return x
    per_token = plan.cached(("gate", table, bounds, x.dtype, x.device), lambda: _per_token(x, plan, factors, bounds))
    return x * per_token


def _per_token(x: Tensor, plan: MaskPlan, factors, bounds: tuple[int, ...]) -> Tensor:
    """[B, 1, in]: labels are those of sequences."""
    labels = plan.labels(x.device).view(plan.batch, plan.seq_len)[:, 0]
    by_group = table_on(x.device, x.dtype, factors).index_select(1, labels)  # [groups, B]
    sizes = torch.tensor([high - low for low, high in pairwise(bounds)], device=x.device)
    return by_group.repeat_interleave(sizes, 0, output_size=bounds[-1]).t()[:, None].contiguous()


class _Linear(torch.autograd.Function):
    """Saves the parameter itself, never a view: ZeRO-3 gathers it again before the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, plan, layout):
        if not layout.incoming:
            x = gate(x, plan, "active", layout.bounds)
        ctx.save_for_backward(x, weight)
        ctx.plan, ctx.layout, ctx.bias_dtype = plan, layout, None if bias is None else bias.dtype
        matrix, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if not layout.inputs_first:
            return F.linear(x, matrix, bias)
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), matrix).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        plan, layout, wanted = ctx.plan, ctx.layout, ctx.needs_input_grad
        dx = dw = db = None
        x2, dy2 = x.flatten(0, 1), dy.flatten(0, 1)
        if wanted[0]:
            matrix = weight.to(dy.dtype)
            dx = torch.mm(dy2, matrix.t() if layout.inputs_first else matrix).view(x.shape)
            if not layout.incoming:
                dx = gate(dx, plan, "passes", layout.bounds)
        work = layout.work(plan)
        if wanted[1]:
            left, right = (dy2, x2) if layout.incoming else (x2, dy2)
            dw = weight_gradient(left, right, plan, work)
            dw = (dw.t() if layout.incoming == layout.inputs_first else dw).to(weight.dtype)
        if wanted[2]:
            if layout.incoming:
                db = torch.cat([token_sum(dy2[:, low:high], plan, tokens) for low, high, tokens in work])
            else:
                db = token_sum(dy2, plan, plan.joint(f"{layout.kind}_bias"))
            db = db.to(ctx.bias_dtype)
        return dx, dw, db, None, None


def scale(x: Tensor, weight: Tensor, plan: MaskPlan, kind: str) -> Tensor:
    """weight [D] * x [B, S, ..., D], the last step of Hugging Face's RMSNorm; `kind`: who may update the weight."""
    plan.check(x)
    return _NormScale.apply(x, weight, plan, kind)


class _NormScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, plan, kind):
        ctx.save_for_backward(x, weight)
        ctx.plan, ctx.kind = plan, kind
        return weight * x

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = (dy * weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        dw = _scale_gradient(dy, x, weight, ctx.plan, ctx.kind) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float | None, plan: MaskPlan, kind: str) -> Tensor:
    """`nn.RMSNorm` of x [B, S, ..., D] with weight [D]; `kind`: who may update the weight."""
    plan.check(x)
    return _WholeNorm.apply(x, weight, eps, plan, kind)


class _WholeNorm(torch.autograd.Function):
    """Value and dX are torch's own, which differ between devices; dX normalizes x again."""

    @staticmethod
    def forward(ctx, x, weight, eps, plan, kind):
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.plan, ctx.kind = eps, plan, kind
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            with torch.enable_grad():
                x_again = x.detach().requires_grad_()
                y = F.rms_norm(x_again, weight.shape, weight.detach(), ctx.eps)
            (dx,) = torch.autograd.grad(y, x_again, dy)
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(x.dtype, torch.float32)
            eps = torch.finfo(x.dtype).eps if ctx.eps is None else ctx.eps
            normalized = F.rms_norm(x.to(wide), weight.shape, None, eps)
            dw = _scale_gradient(dy, normalized, weight, ctx.plan, ctx.kind)
        return dx, dw, None, None, None


def _scale_gradient(dy: Tensor, x: Tensor, weight: Tensor, plan: MaskPlan, kind: str) -> Tensor:
    """Gradient of weight [D] in weight * x [B, S, ..., D], over the tokens that may update it."""
    products = (dy.to(torch.promote_types(dy.dtype, torch.float32)) * x).flatten(0, 1)
    sums = token_sum(products.flatten(1), plan, plan.joint(kind))
    return sums.view(-1, weight.shape[0]).sum(0).to(weight.dtype)
