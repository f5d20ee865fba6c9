"""What the activations' kernels are launched as, and what their machine code must have."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch

from sgtm_kernels.mlp.kernel import TILES, Tile, _backward, _forward, activation_backward
from sgtm_kernels.tools.launches import KernelVariant, plan_of, record_launches
from sgtm_kernels.triton_common.tuning import DTYPES

FEW, MANY = (0, 960, 1024), (0, 900, 960, 1024)  # groups


class Sums(NamedTuple):
    """Whether there is a bias, whether its gradient is summed, and by weights."""

    biased: bool
    summed: bool = False
    weighted: bool = False


def variants() -> list[KernelVariant]:
    """Every block size and flag, at some bounds, in bf16 and fp32; candidates besides the heuristic bare and with the
    most groups, every form of the bias sums with few groups."""
    variants: list[KernelVariant] = []
    bare, most = ((0, 1024), False), (MANY, True)
    for dtype, gated, name in product((torch.bfloat16, torch.float32), (False, True), TILES):
        heuristic, *others = TILES[name].candidates(DTYPES[dtype], "gated" if gated else "plain")
        cases = [(tile, *form) for tile in (heuristic, *others) for form in (bare, most)]
        cases += [(heuristic, *form) for form in ((FEW, False), (FEW, True), (MANY, False))]
        for tile, bounds, masked in cases:
            backward = name == activation_backward.__name__
            sums = [Sums(False)]
            if not gated:
                all_forms = bounds == FEW and backward
                sums += (
                    [Sums(True), Sums(True, True), Sums(True, True, True)] if all_forms else [Sums(True, True, masked)]
                )
            for each in sums:
                variants += _launched(name, dtype, tile, bounds, gated, masked, each)
    return variants


def _launched(
    name: str, dtype: torch.dtype, tile: Tile, bounds: tuple[int, ...], gated: bool, masked: bool, sums: Sums
) -> list[KernelVariant]:
    x, y = torch.empty(1, 37, (1 + gated) * bounds[-1], dtype=dtype), torch.empty(1, 37, bounds[-1], dtype=dtype)
    plan = plan_of(len(bounds) - 1, 37, active=0.5 if masked else 1.0, update=0.0 if sums.weighted else 1.0)
    arguments = (x, y[0, 0] if sums.biased else None, plan, bounds, gated)
    backward = name == activation_backward.__name__
    call = (_backward, y, *arguments, (True, sums.summed)) if backward else (_forward, *arguments)
    # Tensors that are moved: x and y, or x, dy and dx; x and dx twice if gated, where the second begins at 16 bytes.
    if gated and any(bound * dtype.itemsize % 16 for bound in bounds):
        moved = 1
    elif gated:
        moved = 5 if backward else 3
    else:
        moved = 3 if backward else 2
    words = moved * KernelVariant.words(tile.tokens * tile.neurons, dtype, tile.warps)
    return [
        replace(
            launch,
            max_subwords=int(sums.biased),  # a thread's bias
            min_wide_words=max(1, words),
            min_programs=(20 if backward else 32) // tile.warps,
        )
        for launch in record_launches(*call, forced={(name, (DTYPES[dtype], "gated" if gated else "plain")): tile})
        if launch.kernel.__name__ == name
    ]
