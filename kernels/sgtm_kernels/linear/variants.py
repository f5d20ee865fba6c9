"""What the linear layers' kernels are launched as, and what their machine code must have."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch

from sgtm_kernels.linear import rectangles, scaling
from sgtm_kernels.tools.launches import KernelVariant, plan_of, record_launches
from sgtm_kernels.triton_common.tiles import total_of
from sgtm_kernels.triton_common.tuning import DTYPES, Key

SPILL = "on sm_90 ptxas keeps 8 bytes in memory to stay at 56 registers"


def variants() -> list[KernelVariant]:
    """Every block size and flag, at some widths and bounds, in bf16 and fp32."""
    return _scaling() + _partial_sums() + _rectangles()


def _scaling() -> list[KernelVariant]:
    """Every block size and flag, at some bounds, in bf16 and fp32."""
    variants: list[KernelVariant] = []
    passes = [flags for flags in product((False, True), repeat=3) if flags[0] >= flags[1] and flags[0] | flags[2]]
    for dtype, bounds in product((torch.bfloat16, torch.float32), ((0, 4096), (0, 960, 1024), (0, 24, 48, 771, 3000))):
        x, dy = torch.empty(37, bounds[-1], dtype=dtype), torch.empty(37, 1024, dtype=dtype)
        copy, factors, partial = torch.empty_like(x), torch.empty(len(bounds) - 1, 37), torch.empty(1, bounds[-1])
        key: Key = (DTYPES[dtype],)
        for tile in scaling.TILE.candidates(*key):
            forced = {(scaling.TILE.name, key): tile}
            words = KernelVariant.words(tile.tokens * tile.columns, dtype, tile.warps)
            for scale, in_place, add in passes if len(bounds) > 2 else [(False, False, True)]:
                out = (x if in_place else copy) if scale else None
                launches = record_launches(
                    scaling.scale_sum, x, out, partial if add else None, factors, bounds, forced=forced
                )
                spill = SPILL if tile.tokens == 16 and in_place and add else None
                variants += [
                    replace(launch, min_programs=4, spill=spill, min_wide_words=(1 + scale) * words)  # load, store
                    for launch in launches
                ]
            if len(bounds) > 2:
                launches = record_launches(
                    scaling.scale_input_sum, x, copy, dy, partial, factors, factors, bounds, forced=forced
                )
                variants += [replace(launch, min_programs=4, min_wide_words=3 * words) for launch in launches]
    return variants


def _partial_sums() -> list[KernelVariant]:
    """Of all ops that sum by strips: the only block size, in bf16 and fp32."""
    partial = torch.empty(3, 37)
    launches = [
        launch for dtype in (torch.bfloat16, torch.float32) for launch in record_launches(total_of, partial, dtype)
    ]
    return [replace(launch, widest_bits=32, max_subwords=1) for launch in launches]


def _rectangles() -> list[KernelVariant]:
    """Every block size and flag, in bf16 and fp32."""
    variants: list[KernelVariant] = []
    for dtype, weighted in product((torch.bfloat16, torch.float32), (False, True)):
        plan, half = plan_of(2, 37, update=0.5 if weighted else 0.0), dtype == torch.bfloat16
        for loads in ("pointers", "ragged", "descriptors"):
            ragged = loads == "ragged"
            key: Key = rectangles._key(DTYPES[dtype], weighted, loads)
            left, right = (torch.empty(37, n - ragged, dtype=dtype) for n in (1024, 768))
            work = plan.rows("mlp_in", (0, 960, left.shape[1]))
            for tile in rectangles.TILE.candidates(*key):
                columns = (tile.columns // max(1, 16 * tile.warps // tile.rows),) if half else None
                forced = {(rectangles.TILE.name, key): tile}
                variants += [
                    replace(
                        launch,
                        first_arch=90 if loads == "descriptors" else 80,
                        tensor_cores=half,
                        hgmma_columns=columns,
                        widest_bits=32 if ragged else 128,
                        max_subwords=176 if ragged else 0,
                        max_below_widest=None if ragged else 7,  # a band, a slice, its weight
                    )
                    for launch in record_launches(rectangles._launch, left, right, plan, work, loads, forced=forced)
                ]
    return variants
