"""dW of labels that change from token to token, as a persistent GEMM over (token range x row range) rectangles.

Of the left operand's columns (the rows of dW) each range has the tokens that may update it as a list of slices. A
program takes tiles of dW in turn and walks over the slices of the tile's row range. Operands are read through two
tensor descriptors, made once, where the device has them and the row lengths suit them, else by pointers. The last
tokens of a slice are a block of their own: of both operands what lies beyond the slice is replaced by 0 in registers,
so that it cannot change a bit, NaN included; what lies beyond a row range gives rows that are not stored. So masked
work is not done, and rows that no token may update are written as 0 without reading anything. A tile is summed by one
program, slice after slice in fp32: deterministic.

The tables of ranges and slices go to the device in a copy of their own, one for each projection (`attn_in`, ...) whose
labels are too many slices in a micro-batch.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sgtm_kernels.plan import MaskPlan, RowWork, Slice
from sgtm_kernels.triton_common.tuning import DTYPES, Tunable


class Tile(NamedTuple):
    rows: int
    columns: int
    tokens: int
    warps: int
    stages: int


def _heuristic(dtype: str, weights: str, loads: str) -> Tile:
    """As large as the registers allow on every architecture.

    Weights other than 1 need a second accumulator, pointers and masks registers too, fp32 has no tensor cores.
    """
    if (dtype, loads) == ("bf16", "ragged"):
        return Tile(64, 128, 64, 8, 3)
    if dtype == "fp32":
        if weights == "ones":
            return Tile(64, 64, 16, 8, 2)
        return Tile(32, 64, 16, 4, 2) if loads == "descriptors" else Tile(64, 32, 16, 4, 2)
    columns = 256 if loads == "descriptors" else 128
    return Tile(128, columns if weights == "ones" else columns // 2, 64, 8, 3)


# By dtype, whether weights other than 1 occur, and how the operands are read: see `_loads`.
TILE = Tunable(
    "dw_rectangles",
    _heuristic,
    {
        ("bf16", "ones", "descriptors"): (Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4)),
        ("bf16", "ones", "pointers"): (Tile(128, 128, 32, 8, 4),),
    },
)


def _key(dtype: str, weighted: bool, loads: str) -> tuple[str, str, str]:
    return dtype, "weights" if weighted else "ones", loads


def weight_gradient(left: torch.Tensor, right: torch.Tensor, plan: MaskPlan, work: tuple[RowWork, ...]) -> torch.Tensor:
    """Masked `left^T @ right`: left [tokens, rows], right [tokens, columns], both contiguous -> [rows, columns]."""
    return _launch(left, right, plan, work, _loads(left, right, work))


def _launch(left, right, plan: MaskPlan, work: tuple[RowWork, ...], loads: str) -> torch.Tensor:
    """`weight_gradient` with the operands read as one variant of `_loads` does."""
    rows, columns = left.shape[1], right.shape[1]
    weighted = any(piece.weight != 1 for _, _, tokens in work for piece in tokens.slices)
    tile, descriptors = TILE(left.device, *_key(DTYPES[left.dtype], weighted, loads)), loads == "descriptors"
    if descriptors and left.is_cuda:
        triton.set_allocator(_scratch)
    key = ("rectangles", work, tile.rows, left.device)
    bands, slices, weights = plan.cached(key, lambda: _tables(work, tile.rows, left.device))
    out = left.new_empty(rows, columns)
    tiles = len(bands) * -(-columns // tile.columns)
    dw_rectangles[(min(tiles, _programs(left.device)),)](
        left, right, out, bands, slices, weights, len(left), rows, columns, tiles, WEIGHTED=weighted,
        DESCRIPTORS=descriptors, ALIGNED=loads != "ragged", BR=tile.rows, BC=tile.columns, BT=tile.tokens,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def has_descriptors(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def _loads(left: torch.Tensor, right: torch.Tensor, work: tuple[RowWork, ...]) -> str:
    """How the operands are read: `ragged`, by pointers of which nothing is known, where a row is not a multiple of 16
    elements or a row range does not begin at 16 bytes; else by `descriptors`, where there are such, or `pointers`."""
    starts = [left.data_ptr(), right.data_ptr(), *(rows.start * left.element_size() for rows in work)]
    if left.shape[1] % 16 or right.shape[1] % 16 or any(start % 16 for start in starts):
        return "ragged"
    return "descriptors" if has_descriptors(left.device) else "pointers"


def _tables(
    work: tuple[RowWork, ...], height: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bands of at most `height` rows, int32 [bands, 4]: first row, end, first slice, end; and the slices of all ranges,
    int32 [slices, 2], with their weights, fp32 [slices]."""
    bands: list[tuple[int, int, int, int]] = []
    slices: list[Slice] = []
    for start, end, tokens in work:
        first = len(slices)
        slices += tokens.slices
        bands += [(row, min(row + height, end), first, len(slices)) for row in range(start, end, height)]
    spans = [(piece.start, piece.end) for piece in slices]
    spans += [(0, 0)] * (len(spans) % 2)  # so that the weights begin at 16 bytes
    weights = torch.tensor([piece.weight for piece in slices], dtype=torch.float32, device="cpu").view(torch.int32)
    numbers = torch.tensor([*chain(*bands, *spans)], dtype=torch.int32, device="cpu")
    sizes = 4 * len(bands), 2 * len(spans), len(weights)
    packed = torch.empty(sum(sizes), dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
    torch.cat((numbers, weights), out=packed)
    parts = packed.to(device, non_blocking=True).split(sizes)
    return parts[0].view(-1, 4), parts[1].view(-1, 2)[: len(slices)], parts[2].view(torch.float32)


def _programs(device: torch.device) -> int:
    """One per multiprocessor; a few in the interpreter, so that each takes several tiles there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for the descriptors that a kernel makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@triton.jit
def _operand(x, tiles, token, column, width, first_token, first_column, inside, DESCRIPTORS: tl.constexpr):
    """[tokens, columns] of x [.., width]: by a descriptor, unmasked, or by pointers, 0 where not `inside`."""
    if DESCRIPTORS:
        return tiles.load([first_token, first_column])
    else:
        return tl.load(x + token.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def dw_rectangles(
    left, right, out, bands, slices, weights, tokens, rows, columns, tiles, WEIGHTED: tl.constexpr,
    DESCRIPTORS: tl.constexpr, ALIGNED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """ALIGNED: bands begin at multiples of 16 bytes, and rows of the operands have multiples of 16 elements."""
    left_tiles, right_tiles = left, right
    if DESCRIPTORS:
        left_tiles = tl.make_tensor_descriptor(left, [tokens, rows], [rows, 1], [BT, BR])
        right_tiles = tl.make_tensor_descriptor(right, [tokens, columns], [columns, 1], [BT, BC])
    blocks = tl.cdiv(columns, BC)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        band = bands + 4 * (tile // blocks)
        row0, row_end, first, last = tl.load(band), tl.load(band + 1), tl.load(band + 2), tl.load(band + 3)
        column0 = (tile % blocks) * BC
        if ALIGNED:
            row0 = tl.multiple_of(row0, 16 * 8 // left.dtype.element_ty.primitive_bitwidth)
        row, column = row0 + tl.arange(0, BR), column0 + tl.arange(0, BC)
        row_inside, column_inside = (row < rows)[None, :], (column < columns)[None, :]
        total = tl.zeros([BR, BC], dtype=tl.float32)
        part = tl.zeros([BR, BC], dtype=tl.float32)
        for i in range(first, last):
            start, end = tl.load(slices + 2 * i), tl.load(slices + 2 * i + 1)
            whole = end - (end - start) % BT
            for t in range(start, whole, BT):
                token = t + tl.arange(0, BT)
                a = _operand(left, left_tiles, token, row, rows, t, row0, row_inside, DESCRIPTORS)
                b = _operand(right, right_tiles, token, column, columns, t, column0, column_inside, DESCRIPTORS)
                part = tl.dot(tl.trans(a), b, part, input_precision="ieee")
            if whole < end:
                token = whole + tl.arange(0, BT)
                inside = (token < end)[:, None]
                a = _operand(left, left_tiles, token, row, rows, whole, row0, inside & row_inside, DESCRIPTORS)
                b = _operand(
                    right, right_tiles, token, column, columns, whole, column0, inside & column_inside, DESCRIPTORS
                )
                a, b = tl.where(inside, a, 0.0).to(a.dtype), tl.where(inside, b, 0.0).to(b.dtype)
                part = tl.dot(tl.trans(a), b, part, input_precision="ieee")
            if WEIGHTED:
                total += tl.load(weights + i) * part
                part = tl.zeros([BR, BC], dtype=tl.float32)
        if WEIGHTED:
            part = total
        offsets = row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(
            out + offsets, part.to(out.dtype.element_ty), mask=(row < row_end)[:, None] & (column < columns)[None, :]
        )
