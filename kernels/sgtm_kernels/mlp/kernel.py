"""The MLP's non-linearity in one Triton pass each way, `active` and `route` applied where the values are in registers.

A program does tiles of tokens x neurons; the factor of each (token, group) comes from `MaskPlan.factors`. Where no
factor differs from 1, the kernel is compiled without them. Memory traffic is that of the plain op. The bias of the
linear layer before it is added here, so that its gradient comes out of the same backward pass (triton_common/tiles.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.library import custom_op

from sgtm_kernels.autograd import captured, eager, existing, register
from sgtm_kernels.linear.kernel import in_backward, linear_in
from sgtm_kernels.plan import MaskPlan, plan_of
from sgtm_kernels.triton_common.tiles import factor_of, group_of_column, partial_sums, total_of
from sgtm_kernels.triton_common.tuning import DTYPES, Key, Tunable


class Tile(NamedTuple):
    tokens: int
    neurons: int
    warps: int


# By dtype, and whether the MLP is gated; 16 elements for each thread throughout.
WIDER = (Tile(16, 128, 4), Tile(32, 128, 8))
OTHERS: dict[Key, tuple[Tile, ...]] = {("bf16", "plain"): WIDER, ("bf16", "gated"): WIDER}
TILES = {
    name: Tunable(name, lambda dtype, gated: Tile(32, 64, 4), OTHERS)
    for name in ("activation_forward", "activation_backward")
}

STRIP = 128  # tokens of one program of the backward pass, and of one partial sum


def gelu(x, plan: MaskPlan, bounds):
    return _activation(x, None, plan, bounds, False)


def swiglu(x, plan: MaskPlan, bounds):
    return _activation(x, None, plan, bounds, True)


def linear_gelu(x, weight, bias, plan: MaskPlan, bounds):
    if captured() or len(bounds) == 2:
        return _activation(linear_in(x, weight, None, plan, "mlp_in", bounds, True), bias, plan, bounds, False)
    return eager_linear_gelu(x, weight, bias, plan, bounds)


def _activation(x, bias, plan: MaskPlan, bounds, gated):
    if captured():
        return activation(x, bias, plan.handle, bounds, gated)
    return eager_activation(x, bias, plan, bounds, gated)


def _forward(x, bias, plan, bounds, gated):
    neurons, tokens = bounds[-1], plan.tokens
    y = x.new_empty(*x.shape[:-1], neurons)
    factors = plan.mask("active", len(bounds) - 1, x.device)
    tile = _tile(activation_forward, x, gated)
    grid = (-(-tokens // tile.tokens), -(-neurons // tile.neurons))
    x, biased = x.contiguous(), bias is not None
    activation_forward[grid](
        x, bias.contiguous() if biased else x, y, x if factors is None else factors, tokens, BOUNDS=bounds,
        MASKED=factors is not None, GATED=gated, BIASED=biased, BT=tile.tokens, BN=tile.neurons, num_warps=tile.warps,
    )  # fmt: skip
    return y


def _backward(dy, x, bias, plan, bounds, gated, wanted):
    """dX, and where wanted the bias's: sums of dX over the tokens that may update `mlp_in`."""
    neurons, tokens, groups, summed = bounds[-1], plan.tokens, len(bounds) - 1, wanted[1]
    x, dy, biased = x.contiguous(), dy.contiguous(), bias is not None
    dx = torch.empty_like(x)
    factors = plan.mask("passes", groups, x.device)
    weights = plan.mask("mlp_in", groups, x.device) if summed else None
    partial = partial_sums(tokens, STRIP, neurons, x.device) if summed else x
    tile = _tile(activation_backward, x, gated)
    activation_backward[-(-tokens // STRIP), -(-neurons // tile.neurons)](
        x, bias.contiguous() if biased else x, dy, dx, partial, x if factors is None else factors,
        x if weights is None else weights, tokens, BOUNDS=bounds, MASKED=factors is not None, GATED=gated,
        BIASED=biased, SUMMED=summed, WEIGHTED=weights is not None, STRIP=STRIP, BT=tile.tokens, BN=tile.neurons,
        num_warps=tile.warps,
    )  # fmt: skip
    return dx, total_of(partial, bias.dtype) if summed else None


def _keep(inputs, output):
    x, bias, plan, *numbers = inputs
    return (x, bias), plan, numbers


def _pair_forward(x, weight, bias, plan, bounds):
    pre = F.linear(x, weight)
    return _forward(pre, bias, plan, bounds, False), pre


def _pair_keep(inputs, outputs):
    x, weight, bias, plan, bounds = inputs
    return (x, weight, bias, outputs[1]), plan, (bounds,)


def _pair_backward(dh, x, weight, bias, pre, plan, bounds, wanted):
    dpre, db = _backward(dh, pre, bias, plan, bounds, False, wanted[1:])
    dx, dw, _ = in_backward(dpre, x, weight, plan, "mlp_in", bounds, True, (*wanted[:2], False))
    return dx, dw, db


eager_activation = eager(_forward, _keep, _backward)
eager_linear_gelu = eager(_pair_forward, _pair_keep, _pair_backward)


@custom_op(
    "sgtm::activation",
    mutates_args=(),
    schema="(Tensor x, Tensor? bias, Tensor plan, int[] bounds, bool gated) -> Tensor",
)
def activation(x, bias, plan, bounds, gated):
    return _forward(x, bias, plan_of(plan), tuple(bounds), gated)


@activation.register_fake
def _(x, bias, plan, bounds, gated):
    return x.new_empty(*x.shape[:-1], bounds[-1])


@custom_op(
    "sgtm::activation_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor? bias, Tensor plan, int[] bounds, bool gated, bool bias_learns)"
    " -> (Tensor, Tensor)",
)
def activation_gradients(dy, x, bias, plan, bounds, gated, bias_learns):
    return existing(dy, *_backward(dy, x, bias, plan_of(plan), tuple(bounds), gated, (True, bias_learns)))


@activation_gradients.register_fake
def _(dy, x, bias, plan, bounds, gated, bias_learns):
    return x.new_empty(x.shape), bias.new_empty(bias.shape) if bias_learns else x.new_empty(0)


register(activation, _keep, lambda *inputs: activation_gradients(*inputs[:-1], inputs[-1][1]))


def _tile(kernel, x, gated: bool) -> Tile:
    return TILES[kernel.__name__](x.device, DTYPES[x.dtype], "gated" if gated else "plain")


@triton.jit
def _gelu(x):
    """tanh-GELU and its derivative: 0.5 x (1 + tanh u) is x sigmoid(2u), which does not cancel."""
    u2 = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    e = tl.exp(-u2)
    s = 1.0 / (1.0 + e)
    rest = tl.where(e == float("inf"), 1.0, e * s)  # 1 - s, without its cancellation
    return x * s, s + x * s * rest * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@triton.jit
def activation_forward(
    x, bias, y, factors, tokens, BOUNDS: tl.constexpr, MASKED: tl.constexpr, GATED: tl.constexpr,
    BIASED: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    neuron = tl.program_id(1) * BN + tl.arange(0, BN)
    neurons: tl.constexpr = BOUNDS[len(BOUNDS) - 1]
    inside = (token < tokens)[:, None] & (neuron < neurons)[None, :]
    group, start, width = group_of_column(BOUNDS, neuron)
    if GATED:
        gate_at = x + token[:, None] * (2 * neurons) + (start + neuron)[None, :]
        gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_at + width[None, :], mask=inside, other=0.0).to(tl.float32)
        value = gate / (1.0 + tl.exp(-gate)) * up
    else:
        value = tl.load(x + token[:, None] * neurons + neuron[None, :], mask=inside, other=0.0).to(tl.float32)
        if BIASED:
            value += tl.load(bias + neuron, mask=neuron < neurons, other=0.0).to(tl.float32)[None, :]
        value, _ = _gelu(value)
    if MASKED:
        factor = factor_of(factors, tokens, token, group, BOUNDS)
        value = tl.where(factor == 0.0, 0.0, value * factor)
    tl.store(y + token[:, None] * neurons + neuron[None, :], value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def activation_backward(
    x, bias, dy, dx, partial, factors, weights, tokens, BOUNDS: tl.constexpr, MASKED: tl.constexpr,
    GATED: tl.constexpr, BIASED: tl.constexpr, SUMMED: tl.constexpr, WEIGHTED: tl.constexpr, BT: tl.constexpr,
    BN: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """A strip of tokens; SUMMED (with a bias): its sum of dX, by `weights` where they are not all 1, into `partial`."""
    strip = tl.program_id(0).to(tl.int64)
    neuron = tl.program_id(1) * BN + tl.arange(0, BN)
    neurons: tl.constexpr = BOUNDS[len(BOUNDS) - 1]
    group, start, width = group_of_column(BOUNDS, neuron)
    shift = tl.zeros([BN], dtype=tl.float32)
    if BIASED:
        shift = tl.load(bias + neuron, mask=neuron < neurons, other=0.0).to(tl.float32)
    total = tl.zeros([BN], dtype=tl.float32)
    for first in range(0, STRIP, BT):
        token = strip * STRIP + first + tl.arange(0, BT)
        inside = (token < tokens)[:, None] & (neuron < neurons)[None, :]
        offsets = token[:, None] * neurons + neuron[None, :]
        out = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
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
            value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
            if BIASED:
                value += shift[None, :]
            _, slope = _gelu(value)
            d = out * slope
            tl.store(dx + offsets, d.to(dx.dtype.element_ty), mask=inside)
            if SUMMED:
                if WEIGHTED:
                    weight = factor_of(weights, tokens, token, group, BOUNDS)
                    d = tl.where(weight == 0.0, 0.0, d * weight)
                total += tl.sum(tl.where(inside, d, 0.0), axis=0)
    if SUMMED:
        tl.store(partial + strip * neurons + neuron, total, mask=neuron < neurons)
