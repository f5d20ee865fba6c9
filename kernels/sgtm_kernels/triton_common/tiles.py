"""Helpers of kernels that multiply every (token, column) by the factor of the token's label for the column's group."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(bounds: tl.constexpr, column):
    """Group of each column, the group's first column and its width."""
    group = tl.zeros_like(column)
    start = tl.zeros_like(column)
    width = tl.zeros_like(column) + bounds[1]
    for i in tl.static_range(1, len(bounds) - 1):
        inside = column >= bounds[i]
        group = tl.where(inside, i, group)
        start = tl.where(inside, bounds[i], start)
        width = tl.where(inside, bounds[i + 1] - bounds[i], width)
    return group, start, width


@triton.jit
def factor_of(factors, tokens, token, group, bounds: tl.constexpr):
    """The factor of each token for the group of each column, from `MaskPlan.factors`: [tokens, columns] of the tile."""
    factor = tl.load(factors + token, mask=token < tokens, other=1.0)[:, None] + tl.zeros_like(group)[None, :]
    for i in tl.static_range(1, len(bounds) - 1):
        row = tl.load(factors + i * tokens + token, mask=token < tokens, other=1.0)
        factor = tl.where(group[None, :] == i, row[:, None], factor)
    return factor


@triton.jit
def any_factor_but(value: tl.constexpr, factors, tokens, token, first, last, bounds: tl.constexpr):
    """[tokens]: whether a token's factor for some group of the columns `first:last + 1` differs from `value`.

    By token alone: such a mask keeps accesses to whole rows wide, which one by token and column would not.
    """
    found = token < 0
    for i in tl.static_range(len(bounds) - 1):
        row = tl.load(factors + i * tokens + token, mask=token < tokens, other=value)
        found |= (row != value) & (first < bounds[i + 1]) & (last >= bounds[i])
    return found
