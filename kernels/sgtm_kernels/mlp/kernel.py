"""The MLP's non-linearity in one Triton pass each way, `active` and `route` applied where the values are in registers.

A program does a tile of tokens x neurons; the factor of each (token, group) comes from `MaskPlan.factors`. Where no
factor differs from 1, the kernel is compiled without them. Memory traffic is that of the plain op.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch.library import custom_op

from sgtm_kernels.aot import Launch
from sgtm_kernels.plan import MaskPlan, plan_of
from sgtm_kernels.scale import products
from sgtm_kernels.tiles import factor_of, place

TOKENS, NEURONS = 32, 64  # of a tile


def gelu(x, plan: MaskPlan, bounds):
    return activation(x, plan.handle, bounds, False)


def swiglu(x, plan: MaskPlan, bounds):
    return activation(x, plan.handle, bounds, True)


@custom_op("sgtm::activation", mutates_args=(), schema="(Tensor x, Tensor plan, int[] bounds, bool gated) -> Tensor")
def activation(x, plan, bounds, gated):
    plan = plan_of(plan)
    y = x.new_empty(*x.shape[:-1], bounds[-1])
    active = [plan.column("active", group) for group in range(len(bounds) - 1)]
    _launch(activation_forward, (x.contiguous(), y), plan, bounds, active, gated)
    return y


@activation.register_fake
def _(x, plan, bounds, gated):
    return x.new_empty(*x.shape[:-1], bounds[-1])


@custom_op(
    "sgtm::activation_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor dy, Tensor plan, int[] bounds, bool gated) -> Tensor",
)
def activation_gradient(x, dy, plan, bounds, gated):
    plan, dx = plan_of(plan), x.new_empty(x.shape)
    groups = range(len(bounds) - 1)
    factors = [products(plan.column("active", g), plan.column("route", g)) for g in groups]
    _launch(activation_backward, (x.contiguous(), dy.contiguous(), dx), plan, bounds, factors, gated)
    return dx


@activation_gradient.register_fake
def _(x, dy, plan, bounds, gated):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    x, plan, ctx.bounds, ctx.gated = inputs
    ctx.save_for_backward(x, plan)


def _backward(ctx, dy):
    x, plan = ctx.saved_tensors
    return activation_gradient(x, dy, plan, ctx.bounds, ctx.gated), None, None, None


activation.register_autograd(_backward, setup_context=_save)


def _launch(kernel, tensors, plan: MaskPlan, bounds, by_group, gated: bool) -> None:
    # A layer without groups (two bounds) is not masked, whatever the tables say.
    masked = len(bounds) > 2 and any(by_label[run.label] != 1 for by_label in by_group for run in plan.runs)
    factors = plan.factors(by_group, tensors[0].device) if masked else tensors[0]
    grid = (triton.cdiv(plan.tokens, TOKENS), triton.cdiv(bounds[-1], NEURONS))
    kernel[grid](
        *tensors, factors, plan.tokens, BOUNDS=tuple(bounds), MASKED=masked, GATED=gated, BT=TOKENS, BN=NEURONS
    )


@triton.jit
def _gelu(x):
    """tanh-GELU and its derivative: 0.5 x (1 + tanh u) is x sigmoid(2u), which does not cancel."""
    u2 = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    s = 1.0 / (1.0 + tl.exp(-u2))
    return x * s, s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@triton.jit
def activation_forward(
    x, y, factors, tokens, BOUNDS: tl.constexpr, MASKED: tl.constexpr, GATED: tl.constexpr, BT: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    neuron = tl.program_id(1) * BN + tl.arange(0, BN)
    neurons: tl.constexpr = BOUNDS[len(BOUNDS) - 1]
    inside = (token < tokens)[:, None] & (neuron < neurons)[None, :]
    group, start, width = place(BOUNDS, neuron)
    if GATED:
        gate_at = x + token[:, None] * (2 * neurons) + (start + neuron)[None, :]
        gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_at + width[None, :], mask=inside, other=0.0).to(tl.float32)
        value = gate / (1.0 + tl.exp(-gate)) * up
    else:
        value, _ = _gelu(tl.load(x + token[:, None] * neurons + neuron[None, :], mask=inside, other=0.0).to(tl.float32))
    if MASKED:
        factor = factor_of(factors, tokens, token, group, BOUNDS)
        value = tl.where(factor == 0.0, 0.0, value * factor)
    tl.store(y + token[:, None] * neurons + neuron[None, :], value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def activation_backward(
    x, dy, dx, factors, tokens, BOUNDS: tl.constexpr, MASKED: tl.constexpr, GATED: tl.constexpr, BT: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    neuron = tl.program_id(1) * BN + tl.arange(0, BN)
    neurons: tl.constexpr = BOUNDS[len(BOUNDS) - 1]
    inside = (token < tokens)[:, None] & (neuron < neurons)[None, :]
    group, start, width = place(BOUNDS, neuron)
    out = tl.load(dy + token[:, None] * neurons + neuron[None, :], mask=inside, other=0.0).to(tl.float32)
    if MASKED:
        factor = factor_of(factors, tokens, token, group, BOUNDS)
        out = tl.where(factor == 0.0, 0.0, out * factor)
    if GATED:
        gate_at = token[:, None] * (2 * neurons) + (start + neuron)[None, :]
        up_at = gate_at + width[None, :]
        gate = tl.load(x + gate_at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x + up_at, mask=inside, other=0.0).to(tl.float32)
        s = 1.0 / (1.0 + tl.exp(-gate))
        d_gate = out * up * s * (1.0 + gate * (1.0 - s))
        tl.store(dx + gate_at, d_gate.to(dx.dtype.element_ty), mask=inside)
        tl.store(dx + up_at, (out * gate * s).to(dx.dtype.element_ty), mask=inside)
    else:
        at = token[:, None] * neurons + neuron[None, :]
        _, slope = _gelu(tl.load(x + at, mask=inside, other=0.0).to(tl.float32))
        tl.store(dx + at, (out * slope).to(dx.dtype.element_ty), mask=inside)


def launches() -> list[Launch]:
    """Everything that dispatch can launch, for the ahead-of-time suite."""
    found = []
    for gated in (False, True):
        for dtype in ("bf16", "fp32"):
            for bounds in ((0, 1024), (0, 960, 1024), (0, 900, 960, 1024)):
                for masked in (False, True)[: len(bounds) - 1]:
                    constants = {"BOUNDS": bounds, "MASKED": masked, "GATED": gated, "BT": TOKENS, "BN": NEURONS}
                    for kernel, names in ((activation_forward, ("x", "y")), (activation_backward, ("x", "dy", "dx"))):
                        signature = dict.fromkeys(names, f"*{dtype}") | {"factors": "*fp32", "tokens": "i32"}
                        found.append(Launch(kernel, signature, constants, unaligned=("tokens",)))
    return found
