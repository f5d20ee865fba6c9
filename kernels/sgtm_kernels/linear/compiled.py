"""Masked linear layers in a compiled graph: plain matmuls, and the masked sums over tokens as ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sgtm_kernels.graph import define
from sgtm_kernels.linear.pytorch import token_sum, weight_gradient
from sgtm_kernels.plan import MaskPlan, plan_of
from sgtm_kernels.signature import masked


def linear_in(x, weight, bias, plan: MaskPlan, projection: str, bounds, overwrite: bool = False):
    if len(bounds) == 2 or not masked(plan, projection):
        return F.linear(x, weight, bias)
    return _LinearIn.apply(x, weight, bias, plan.handle, projection, bounds)


def linear_out(x, weight, bias, plan: MaskPlan, projection: str, bounds):
    if len(bounds) == 2 or not masked(plan, projection):
        return F.linear(x, weight.t(), bias)
    return _LinearOut.apply(x, weight, bias, plan.handle, projection, bounds)


def _weight_gradient(left, right, plan, projection, bounds):
    plan = plan_of(plan)
    return weight_gradient(left.flatten(0, 1), right.flatten(0, 1), plan, plan.rows(projection, tuple(bounds)))


def _row_sum(dy, plan, projection, bounds):
    plan, dy = plan_of(plan), dy.flatten(0, 1)
    total = dy.new_empty(dy.shape[1])
    for start, end, tokens in plan.rows(projection, tuple(bounds)):
        total[start:end] = token_sum(dy[:, start:end], plan, tokens)
    return total


def _joint_sum(x, plan, kind):
    plan = plan_of(plan)
    return token_sum(x.flatten(0, 1), plan, plan.joint(kind))


masked_product = define(
    "masked_product(Tensor left, Tensor right, Tensor plan, str projection, int[] bounds) -> Tensor",
    _weight_gradient,
    lambda left, right, *masks: left.new_empty(left.shape[-1], right.shape[-1]),
)
"""left [B, S, rows], right [B, S, columns] -> [rows, columns]: the sum over the tokens that may update each row."""

row_sum = define(
    "row_sum(Tensor dy, Tensor plan, str projection, int[] bounds) -> Tensor",
    _row_sum,
    lambda dy, *masks: dy.new_empty(dy.shape[-1]),
)
"""dy [B, S, rows] -> [rows]: the sum over the tokens that may update each row."""

joint_sum = define(
    "joint_sum(Tensor x, Tensor plan, str kind) -> Tensor", _joint_sum, lambda x, *masks: x.new_empty(x.shape[-1])
)
"""x [B, S, columns] -> [columns]: the sum over the tokens that may update joint parameters of this kind."""


class _LinearIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, plan, projection, bounds):
        ctx.save_for_backward(x, weight, plan)
        ctx.masks, ctx.biased = (projection, bounds), bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight, plan = ctx.saved_tensors
        db = row_sum(dy, plan, *ctx.masks) if ctx.biased else None
        return dy @ weight, masked_product(dy, x, plan, *ctx.masks), db, None, None, None


class _LinearOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, plan, projection, bounds):
        ctx.save_for_backward(x, weight, plan)
        ctx.masks, ctx.biased = (projection, bounds), bias is not None
        return F.linear(x, weight.t(), bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight, plan = ctx.saved_tensors
        db = joint_sum(dy, plan, f"{ctx.masks[0]}_bias") if ctx.biased else None
        return dy @ weight.t(), masked_product(x, dy, plan, *ctx.masks), db, None, None, None
