"""What several ops' kernels share: factors of tokens for the columns of a tile, and sums over tokens in two passes.

An op's kernel writes fp32 partial sums of strips of tokens, and one kernel here adds them. Deterministic, without
atomics: the bits depend on shapes, masks and the table of tuned configurations (tuning.py), not on the device's size.
With strips of 128 tokens what is written is 1.6 % of the bf16 that is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WIDTH, PARTIALS = 128, 32  # of a tile of partial sums


@triton.jit
def group_of_column(bounds: tl.constexpr, column):
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
    hits = token < 0
    for i in tl.static_range(len(bounds) - 1):
        row = tl.load(factors + i * tokens + token, mask=token < tokens, other=value)
        hits |= (row != value) & (first < bounds[i + 1]) & (last >= bounds[i])
    return hits


def partial_sums(tokens: int, strip: int, columns: int, device: torch.device) -> torch.Tensor:
    """Empty fp32 [strips, columns], for strips of `strip` tokens."""
    return torch.empty(-(-tokens // strip), columns, dtype=torch.float32, device=device)


def total_of(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum over the strips, [columns]."""
    strips, columns = partial.shape
    total = torch.empty(columns, dtype=dtype, device=partial.device)
    add_partial_sums[(-(-columns // WIDTH),)](partial, total, strips, columns, BS=PARTIALS, BC=WIDTH)
    return total


@triton.jit(do_not_specialize=["strips"])
def add_partial_sums(partial, total, strips, columns, BS: tl.constexpr, BC: tl.constexpr):
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    value = tl.zeros([BC], dtype=tl.float32)
    for start in range(0, strips, BS):
        strip = start + tl.arange(0, BS)
        inside = (strip < strips)[:, None] & (column < columns)[None, :]
        value += tl.sum(tl.load(partial + strip[:, None] * columns + column[None, :], mask=inside, other=0.0), axis=0)
    tl.store(total + column, value.to(total.dtype.element_ty), mask=column < columns)
