"""What the embedding's kernels are launched as, and what their machine code must have."""

from __future__ import annotations

from dataclasses import replace

import torch

from sgtm_kernels.embedding.kernel import _gradient
from sgtm_kernels.tools.launches import KernelVariant, plan_of, record_launches

# Of the models that are timed, and a wide one.
WIDTHS = {torch.bfloat16: (256, 768, 1024, 2048, 4096), torch.float32: (256, 1024, 4096)}
SPILL = "on sm_90 ptxas keeps 8 bytes in memory to stay at 72 registers"


def variants() -> list[KernelVariant]:
    """Every block size and flag, at some widths, in bf16 and fp32."""
    variants: list[KernelVariant] = []
    ids = torch.zeros(1, 37, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        for width in WIDTHS[dtype]:
            dy = torch.empty(1, 37, width, dtype=dtype)
            for weighted in (False, True):
                plan = plan_of(1, 37, update=0.5 if weighted else 1.0)
                spill = SPILL if (dtype, width, weighted) == (torch.bfloat16, 256, True) else None
                partials, backward = record_launches(_gradient, ids, dy, plan, "embedding", 50, dtype)
                variants += [replace(partials, min_programs=8), replace(backward, min_programs=4, spill=spill)]
    return variants
