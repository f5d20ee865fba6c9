"""dW of labels that change from token to token, as a persistent GEMM over (token range x row range) rectangles.

Of the left operand's columns (the rows of dW) each range has the tokens that may update it as a list of slices. A
program takes tiles of dW in turn and walks over the slices of the tile's row range; what lies beyond the end of a slice
or of a row range reads as 0: by the bounds of tensor descriptors, where the device has them and the row lengths suit
them, else by masks. So masked work is not done, and rows that nobody may update are written as 0 without reading
anything. A tile is summed by one program, slice after slice in fp32: deterministic.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sgtm_kernels.launch import Launch
from sgtm_kernels.plan import MaskPlan, RowWork
from sgtm_kernels.tuning import DTYPES, Tunable


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
    rows, columns = left.shape[1], right.shape[1]
    weighted = any(piece.weight != 1 for _, _, tokens in work for piece in tokens.slices)
    loads = _loads(left, right, work)
    tile, descriptors = TILE(left.device, *_key(DTYPES[left.dtype], weighted, loads)), loads == "descriptors"
    if descriptors and left.is_cuda:
        triton.set_allocator(_scratch)
    key = ("rectangles", work, tile.rows, left.device)
    bands, slices, weights = plan.cached(key, lambda: _tables(work, tile.rows, left.device))
    out = left.new_empty(rows, columns)
    tiles = len(bands) * -(-columns // tile.columns)
    dw_rectangles[(min(tiles, _programs(left.device)),)](
        left, right, out, bands, slices, weights, rows, columns, tiles, WEIGHTED=weighted, DESCRIPTORS=descriptors,
        BR=tile.rows, BC=tile.columns, BT=tile.tokens, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def has_descriptors(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def _loads(left: torch.Tensor, right: torch.Tensor, work: tuple[RowWork, ...]) -> str:
    """How the operands are read: by `pointers`; `ragged`, by pointers to rows of which nothing is known, where a row is
    not a multiple of 16 elements; by `descriptors`, where there are such and all row ranges begin at 16 bytes."""
    if left.shape[1] % 16 or right.shape[1] % 16:
        return "ragged"
    starts = [left.data_ptr(), right.data_ptr(), *(rows.start * left.element_size() for rows in work)]
    return "descriptors" if has_descriptors(left.device) and not any(at % 16 for at in starts) else "pointers"


def _tables(work: tuple[RowWork, ...], height: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Bands of at most `height` rows, int32 [bands, 4]: first row, end, first slice, end; and the slices of all ranges,
    int32 [slices, 2], with their weights, fp32 [slices]."""
    bands, slices = [], []
    for start, end, tokens in work:
        first = len(slices)
        slices += tokens.slices
        bands += [(row, min(row + height, end), first, len(slices)) for row in range(start, end, height)]
    spans = [(piece.start, piece.end) for piece in slices]
    tables = (
        torch.tensor(bands, dtype=torch.int32, device="cpu"),
        torch.tensor(spans, dtype=torch.int32, device="cpu").view(-1, 2),
        torch.tensor([piece.weight for piece in slices], dtype=torch.float32, device="cpu"),
    )
    return tuple(table.to(device, non_blocking=True) for table in tables)


def _programs(device: torch.device) -> int:
    """One per multiprocessor; a few in the interpreter, so that each takes several tiles there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for the descriptors that a kernel makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@triton.jit(do_not_specialize=["tiles"])
def dw_rectangles(
    left, right, out, bands, slices, weights, rows, columns, tiles, WEIGHTED: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(columns, BC)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        band = bands + 4 * (tile // blocks)
        row0, row_end, first, last = tl.load(band), tl.load(band + 1), tl.load(band + 2), tl.load(band + 3)
        column0 = (tile % blocks) * BC
        row, column = row0 + tl.arange(0, BR), column0 + tl.arange(0, BC)
        total = tl.zeros([BR, BC], dtype=tl.float32)
        part = tl.zeros([BR, BC], dtype=tl.float32)
        for i in range(first, last):
            start, end = tl.load(slices + 2 * i), tl.load(slices + 2 * i + 1)
            if DESCRIPTORS:
                left_tiles = tl.make_tensor_descriptor(left, [end, row_end], [rows, 1], [BT, BR])
                right_tiles = tl.make_tensor_descriptor(right, [end, columns], [columns, 1], [BT, BC])
                for t in range(start, end, BT):
                    a, b = left_tiles.load([t, row0]), right_tiles.load([t, column0])
                    part = tl.dot(tl.trans(a), b, part, input_precision="ieee")
            else:
                for t in range(start, end, BT):
                    token = t + tl.arange(0, BT)
                    inside = (token < end)[:, None]
                    at = token.to(tl.int64)[:, None]
                    a = tl.load(left + at * rows + row[None, :], mask=inside & (row < row_end)[None, :], other=0.0)
                    b = tl.load(
                        right + at * columns + column[None, :], mask=inside & (column < columns)[None, :], other=0.0
                    )
                    part = tl.dot(tl.trans(a), b, part, input_precision="ieee")
            if WEIGHTED:
                total += tl.load(weights + i) * part
                part = tl.zeros([BR, BC], dtype=tl.float32)
        if WEIGHTED:
            part = total
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(out + at, part.to(out.dtype.element_ty), mask=(row < row_end)[:, None] & (column < columns)[None, :])


def launches() -> list[Launch]:
    """Every block size and flag, in bf16 and fp32, for the ahead-of-time suite."""
    found = []
    for dtype in ("bf16", "fp32"):
        signature = dict.fromkeys(("left", "right", "out"), f"*{dtype}")
        signature |= {"bands": "*i32", "slices": "*i32", "weights": "*fp32"}
        signature |= dict.fromkeys(("rows", "columns", "tiles"), "i32")
        for weighted, loads in product((False, True), ("pointers", "ragged", "descriptors")):
            flags = {"WEIGHTED": weighted, "DESCRIPTORS": loads == "descriptors"}
            unaligned = ("tiles", "rows", "columns") if loads == "ragged" else ("tiles",)
            first_arch = 90 if loads == "descriptors" else 80
            for rows, columns, tokens, warps, stages in TILE.candidates(*_key(dtype, weighted, loads)):
                found.append(
                    Launch(
                        dw_rectangles, signature, flags | {"BR": rows, "BC": columns, "BT": tokens}, warps, stages,
                        unaligned, first_arch=first_arch, tensor_cores=dtype == "bf16",
                    )
                )  # fmt: skip
    return found
