"""The MLP's non-linearity in one Triton pass each way, `active` and `route` applied where the values are in registers.

A program does tiles of tokens x neurons; the factor of each (token, group) comes from `MaskPlan.factors`. Where no
factor differs from 1, the kernel is compiled without them. Memory traffic is that of the plain op. The bias of the
linear layer before it is added here, so that its gradient comes out of the same backward pass (strips.py).
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import triton
import triton.language as tl
from torch.library import custom_op

from sgtm_kernels.launch import Launch
from sgtm_kernels.linear.kernel import linear_in
from sgtm_kernels.plan import MaskPlan, plan_of
from sgtm_kernels.scale import products
from sgtm_kernels.strips import partial_sums, total_of
from sgtm_kernels.tiles import factor_of, place
from sgtm_kernels.tuning import DTYPES, Tunable


class Tile(NamedTuple):
    tokens: int
    neurons: int
    warps: int


# By dtype, and whether the MLP is gated; 16 elements for each thread throughout.
WIDER = (Tile(16, 128, 4), Tile(32, 128, 8))
OTHERS = {("bf16", "plain"): WIDER, ("bf16", "gated"): WIDER}
TILES = {
    name: Tunable(name, lambda dtype, gated: Tile(32, 64, 4), OTHERS)
    for name in ("activation_forward", "activation_backward")
}

STRIP = 128  # tokens of one program of the backward pass, and of one partial sum


def gelu(x, plan: MaskPlan, bounds):
    return activation(x, None, plan.handle, bounds, False)


def swiglu(x, plan: MaskPlan, bounds):
    return activation(x, None, plan.handle, bounds, True)


def linear_gelu(x, weight, bias, plan: MaskPlan, bounds):
    return activation(linear_in(x, weight, None, plan, "mlp_in", bounds, True), bias, plan.handle, bounds, False)


@custom_op(
    "sgtm::activation",
    mutates_args=(),
    schema="(Tensor x, Tensor? bias, Tensor plan, int[] bounds, bool gated) -> Tensor",
)
def activation(x, bias, plan, bounds, gated):
    plan = plan_of(plan)
    y = x.new_empty(*x.shape[:-1], bounds[-1])
    masks = _masks(plan, [plan.column("active", group) for group in range(len(bounds) - 1)], bounds)
    factors = plan.factors(masks, x.device) if masks else x
    constants = {"BOUNDS": tuple(bounds), "MASKED": bool(masks), "GATED": gated, "BIASED": bias is not None}
    tile = _tile(activation_forward, x, gated)
    grid = (triton.cdiv(plan.tokens, tile.tokens), triton.cdiv(bounds[-1], tile.neurons))
    x, bias = x.contiguous(), x if bias is None else bias.contiguous()
    activation_forward[grid](x, bias, y, factors, plan.tokens, **constants, **_blocks(tile))
    return y


@activation.register_fake
def _(x, bias, plan, bounds, gated):
    return x.new_empty(*x.shape[:-1], bounds[-1])


@custom_op(
    "sgtm::activation_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor? bias, Tensor plan, int[] bounds, bool gated, bool wanted)"
    " -> (Tensor, Tensor)",
)
def activation_gradients(dy, x, bias, plan, bounds, gated, wanted):
    """dX, and where `wanted` the bias's: sums of dX over the tokens that may update `mlp_in`."""
    plan, dx, groups = plan_of(plan), x.new_empty(x.shape), range(len(bounds) - 1)
    masks = _masks(plan, [products(plan.column("active", g), plan.column("route", g)) for g in groups], bounds)
    weights = _masks(plan, plan.contributions("mlp_in", len(groups)), bounds) if wanted else None
    partial = partial_sums(plan.tokens, STRIP, bounds[-1], x.device) if wanted else x
    tables = (plan.factors(table, x.device) if table else x for table in (masks, weights))
    constants = {"BOUNDS": tuple(bounds), "MASKED": bool(masks), "GATED": gated, "BIASED": bias is not None}
    constants |= {"SUMMED": wanted, "WEIGHTED": bool(weights), "STRIP": STRIP}
    tile = _tile(activation_backward, x, gated)
    grid = (triton.cdiv(plan.tokens, STRIP), triton.cdiv(bounds[-1], tile.neurons))
    x, dy, bias = x.contiguous(), dy.contiguous(), x if bias is None else bias.contiguous()
    activation_backward[grid](x, bias, dy, dx, partial, *tables, plan.tokens, **constants, **_blocks(tile))
    return dx, total_of(partial, bias.dtype) if wanted else x.new_empty(0)


@activation_gradients.register_fake
def _(dy, x, bias, plan, bounds, gated, wanted):
    return x.new_empty(x.shape), bias.new_empty(bias.shape) if wanted else x.new_empty(0)


def _save(ctx, inputs, output):
    x, bias, plan, ctx.bounds, ctx.gated = inputs
    ctx.save_for_backward(x, bias, plan)


def _gradients(ctx, dy):
    wanted = ctx.needs_input_grad[1]
    dx, db = activation_gradients(dy, *ctx.saved_tensors, ctx.bounds, ctx.gated, wanted)
    return dx, db if wanted else None, None, None, None


activation.register_autograd(_gradients, setup_context=_save)


def _tile(kernel, x, gated: bool) -> Tile:
    return TILES[kernel.__name__](x.device, DTYPES[x.dtype], "gated" if gated else "plain")


def _blocks(tile: Tile) -> dict[str, int]:
    return {"BT": tile.tokens, "BN": tile.neurons, "num_warps": tile.warps}


def _masks(plan: MaskPlan, by_group, bounds):
    """The factors by group and label; None where all are 1, as in a layer without groups, whatever the tables say."""
    masked = len(bounds) > 2 and any(by_label[label] != 1 for by_label in by_group for label in plan.present)
    return tuple(by_group) if masked else None


@triton.jit
def _gelu(x):
    """tanh-GELU and its derivative: 0.5 x (1 + tanh u) is x sigmoid(2u), which does not cancel."""
    u2 = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    s = 1.0 / (1.0 + tl.exp(-u2))
    return x * s, s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@triton.jit
def activation_forward(
    x, bias, y, factors, tokens, BOUNDS: tl.constexpr, MASKED: tl.constexpr, GATED: tl.constexpr,
    BIASED: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
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
    group, start, width = place(BOUNDS, neuron)
    shift = tl.zeros([BN], dtype=tl.float32)
    if BIASED:
        shift = tl.load(bias + neuron, mask=neuron < neurons, other=0.0).to(tl.float32)
    total = tl.zeros([BN], dtype=tl.float32)
    for first in range(0, STRIP, BT):
        token = strip * STRIP + first + tl.arange(0, BT)
        inside = (token < tokens)[:, None] & (neuron < neurons)[None, :]
        at = token[:, None] * neurons + neuron[None, :]
        out = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
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
            value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            if BIASED:
                value += shift[None, :]
            _, slope = _gelu(value)
            d = out * slope
            tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
            if SUMMED:
                if WEIGHTED:
                    weight = factor_of(weights, tokens, token, group, BOUNDS)
                    d = tl.where(weight == 0.0, 0.0, d * weight)
                total += tl.sum(tl.where(inside, d, 0.0), axis=0)
    if SUMMED:
        tl.store(partial + strip * neurons + neuron, total, mask=neuron < neurons)


def launches() -> list[Launch]:
    """Every block size and flag, at some bounds, in bf16 and fp32, for the ahead-of-time suite; candidates besides the
    heuristic bare and with the most groups, all ways to sum the bias with few groups."""
    found = []
    few, many = (0, 960, 1024), (0, 900, 960, 1024)
    forms, more = [((0, 1024), False), (many, True)], [(few, False), (few, True), (many, False)]
    for dtype, gated, kernel in product(("bf16", "fp32"), (False, True), (activation_forward, activation_backward)):
        kinds = dict.fromkeys(("x", "bias", "y", "dy", "dx"), f"*{dtype}") | {"tokens": "i32"}
        kinds |= dict.fromkeys(("partial", "factors", "weights"), "*fp32")
        signature = {name: kinds[name] for name in kernel.arg_names if name in kinds}
        heuristic, *others = TILES[kernel.__name__].candidates(dtype, "gated" if gated else "plain")
        for tile, (bounds, masked) in [*product((heuristic, *others), forms), *product((heuristic,), more)]:
            sums = [(True, False, False), (True, True, False), (True, True, True)]
            sums = sums if bounds == few and kernel is activation_backward else [(True, True, masked)]
            for biased, summed, weighted in [(False, False, False), *sums][: 1 if gated else None]:
                constants = {"BOUNDS": bounds, "MASKED": masked, "GATED": gated, "BIASED": biased}
                constants |= {"SUMMED": summed, "WEIGHTED": weighted, "STRIP": STRIP}
                constants |= {"BT": tile.tokens, "BN": tile.neurons}
                constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
                found.append(Launch(kernel, signature, constants, tile.warps, unaligned=("tokens",)))
    return found
