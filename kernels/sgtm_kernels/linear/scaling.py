"""Scaling an operand of dW by its tokens' weights, and sums over tokens with weights, in one pass.

What is masked cannot change a bit of the results, whatever it is, NaN included: it is replaced by 0 once it is in
registers. Reading it or not is decided for all of a token's entries in a block of columns, so that loads and stores
stay 128 bits wide: a token that no group of the block wants is not read, and one that keeps all its entries is not
written in place. Sums are by strips of tokens (tiles.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sgtm_kernels.triton_common.tiles import any_factor_but, factor_of, group_of_column, partial_sums, total_of
from sgtm_kernels.triton_common.tuning import DTYPES, Tunable


class Tile(NamedTuple):
    """`strip`: tokens of one program. For each it writes one fp32 partial sum per column: 1.6 % of the bf16 that it
    reads where a strip is 128."""

    tokens: int
    columns: int
    strip: int
    warps: int


TILE = Tunable(  # by dtype
    "linear_sums", lambda dtype: Tile(32, 128, 128, 4), {("bf16",): (Tile(16, 256, 128, 4), Tile(32, 128, 256, 4))}
)


def masked_sum(x: torch.Tensor, factors: torch.Tensor | None, bounds: tuple[int, ...]) -> torch.Tensor:
    """Sum over the tokens of x [tokens, columns] times the factor of token and column's group, [columns]."""
    if factors is None:
        return x.sum(0)
    partial = sums_of(x)
    scale_sum(x, None, partial, factors, bounds)
    return total_of(partial, x.dtype)


def sums_of(x: torch.Tensor) -> torch.Tensor:
    """Empty partial sums for x [tokens, columns]."""
    return partial_sums(x.shape[0], _tile(x).strip, x.shape[1], x.device)


def _tile(x: torch.Tensor) -> Tile:
    return TILE(x.device, DTYPES[x.dtype])


def scale_sum(x, out, partial, factors, bounds) -> None:
    """`out` = x times its factors (None: not wanted; x itself: in place), `partial` = the sums of that (or None)."""
    (tokens, columns), tile = x.shape, _tile(x)
    grid = (-(-columns // tile.columns), -(-tokens // tile.strip))
    scale_and_sum[grid](
        x, x if out is None else out, factors if partial is None else partial, factors, tokens, BOUNDS=bounds,
        SCALE=out is not None, IN_PLACE=out is x, SUM=partial is not None, BT=tile.tokens, BC=tile.columns,
        STRIP=tile.strip, num_warps=tile.warps,
    )  # fmt: skip


def scale_input_sum(x, out, dy, partial, x_factors, dy_factors, bounds) -> None:
    (tokens, columns), tile = dy.shape, _tile(dy)
    blocks = -(-bounds[-1] // tile.columns) - (-columns // tile.columns)
    grid = (blocks, -(-tokens // tile.strip))
    scale_input_and_sum[grid](
        x, out, dy, partial, x_factors, dy_factors, tokens, BOUNDS=bounds, WIDTH=(0, columns), BT=tile.tokens,
        BC=tile.columns, STRIP=tile.strip, num_warps=tile.warps,
    )  # fmt: skip


@triton.jit
def _strip(
    x, out, partial, factors, tokens, block, strip, BOUNDS: tl.constexpr, SCALE: tl.constexpr, IN_PLACE: tl.constexpr,
    SUM: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Scale and sum `STRIP` tokens of one block of columns. A factor of 0 leaves 0, whatever it is a factor of."""
    columns: tl.constexpr = BOUNDS[len(BOUNDS) - 1]
    first, last = block * BC, tl.minimum(block * BC + BC, columns) - 1
    column = first + tl.arange(0, BC)
    group, _, _ = group_of_column(BOUNDS, column)
    total = tl.zeros([BC], dtype=tl.float32)
    for start in range(0, STRIP, BT):
        token = strip.to(tl.int64) * STRIP + start + tl.arange(0, BT)
        inside = (token < tokens)[:, None] & (column < columns)[None, :]
        factor = factor_of(factors, tokens, token, group, BOUNDS)
        offsets = token[:, None] * columns + column[None, :]
        wanted = any_factor_but(0.0, factors, tokens, token, first, last, BOUNDS)
        value = tl.load(x + offsets, mask=inside & wanted[:, None], other=0.0).to(tl.float32)
        value = tl.where(factor == 0.0, 0.0, value * factor)
        if SCALE:
            written = inside
            if IN_PLACE:
                written &= any_factor_but(1.0, factors, tokens, token, first, last, BOUNDS)[:, None]
            tl.store(out + offsets, value.to(out.dtype.element_ty), mask=written)
        if SUM:
            total += tl.sum(value, axis=0)
    if SUM:
        tl.store(partial + strip.to(tl.int64) * columns + column, total, mask=column < columns)


@triton.jit
def scale_and_sum(
    x, out, partial, factors, tokens, BOUNDS: tl.constexpr, SCALE: tl.constexpr, IN_PLACE: tl.constexpr,
    SUM: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    block, strip = tl.program_id(0), tl.program_id(1)
    _strip(x, out, partial, factors, tokens, block, strip, BOUNDS, SCALE, IN_PLACE, SUM, BT, BC, STRIP)


@triton.jit
def scale_input_and_sum(
    x, out, dy, partial, x_factors, dy_factors, tokens, BOUNDS: tl.constexpr, WIDTH: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """The first blocks scale a copy of x, the others sum dy by its factors."""
    blocks: tl.constexpr = (BOUNDS[len(BOUNDS) - 1] + BC - 1) // BC
    block, strip = tl.program_id(0), tl.program_id(1)
    if block < blocks:
        _strip(x, out, partial, x_factors, tokens, block, strip, BOUNDS, True, False, False, BT, BC, STRIP)
    else:
        _strip(dy, dy, partial, dy_factors, tokens, block - blocks, strip, WIDTH, False, False, True, BT, BC, STRIP)
