"""What AdamW's kernel is launched as, and what its machine code must have."""

from __future__ import annotations

from dataclasses import replace

import torch

from sgtm_kernels.adamw.kernel import BLOCK, GRADS, prepare
from sgtm_kernels.adamw.op import Tensors, WeightSlice
from sgtm_kernels.tools.launches import KernelVariant, record_launches


def variants() -> list[KernelVariant]:
    """Every dtype of a gradient."""
    update, weight, variants = prepare([WeightSlice(0, 0, 8, 0, 0.1)], (0.9, 0.95), 1e-8), torch.empty(8), []
    threads = 32 * KernelVariant.num_warps
    for dtype in GRADS:
        tensors = [Tensors(weight, torch.empty(8, dtype=dtype), weight, weight)]
        variants += [
            replace(
                launch,
                min_programs=8,
                # Aligned: weights and moments are read and written 16 bytes at a time.
                min_wide_words=2 * 3 * BLOCK * 4 // (16 * threads),
                # Slices begin anywhere: gradients one by one.
                max_subwords=BLOCK // threads,
            )
            for launch in record_launches(update, tensors, [1], 1e-3, 1.0)
        ]
    return variants
