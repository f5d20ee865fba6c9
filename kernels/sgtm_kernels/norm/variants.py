"""What the norms' kernels are launched as, and what their machine code must have."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch

from sgtm_kernels.norm.kernel import SUM_COLUMNS, SUM_STRIPS, _gradients, _normalized, _shape
from sgtm_kernels.tools.launches import KernelVariant, plan_of, record_launches

WIDTHS = (1024, 256, 768, 2048, 8192)  # of the models that are timed, the common one first


def variants() -> list[KernelVariant]:
    """Every block size, and in the common one every flag, in bf16 and fp32; at other
    widths those flags that need the most registers."""
    variants: list[KernelVariant] = []
    for dtype in (torch.bfloat16, torch.float32):
        for width in WIDTHS if dtype == torch.bfloat16 else WIDTHS[:1]:
            flags = product((False, True), (True, False), ((True, True), (True, False), (False, False)))
            for centered, added, (summed, masked) in flags:
                if width == WIDTHS[0] or (added and summed and masked):
                    variants += _variants(dtype, width, centered, added, summed, masked)
    return variants


def _variants(
    dtype: torch.dtype, width: int, centered: bool, added: bool, summed: bool, masked: bool
) -> list[KernelVariant]:
    """What differs in these flags: the forward pass and the sums are launched for others of them too."""
    x, statistics, shape, warps = torch.empty(1, 37, width, dtype=dtype), torch.empty(37), *_shape(width)
    weight, bias, residual = x[0, 0], x[0, 0] if centered else None, x if added else None
    arguments = (residual, x, x, weight, bias, statistics, statistics, plan_of(1, 37, update=0.5 if masked else 1.0))
    backward, *sums = record_launches(_gradients, *arguments, "norm", summed)
    tile, row = (KernelVariant.words(n * shape["BD"], dtype, warps) for n in (shape["BT"], 1))
    # x, dy and dx, with dtotal; the weight; its sums, and the bias's.
    min_wide_words = (3 + added) * tile + row
    min_wide_words += (1 + centered) * KernelVariant.words(shape["BD"], torch.float32, warps) if summed else 0
    variants = [replace(backward, min_programs=16 // warps, min_wide_words=min_wide_words)]
    if summed and masked:
        (forward,) = record_launches(_normalized, x, residual, weight, bias, 1e-5)
        # x and y, with the residual and the total; the weight, with the bias.
        min_wide_words = (2 + 2 * added) * tile + (1 + centered) * row
        variants.append(replace(forward, min_programs=32 // warps, min_wide_words=min_wide_words))
        if centered and added:
            # A thread stores one entry.
            min_wide_words = KernelVariant.words(SUM_STRIPS * SUM_COLUMNS, torch.float32, KernelVariant.num_warps)
            variants += [replace(launch, min_wide_words=min_wide_words, max_subwords=1) for launch in sums]
    return variants
