"""What the loss's kernel is launched as, and what its machine code must have."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch

from sgtm_kernels.cross_entropy.kernel import BLOCK, TILE, _logits, _softmax_gradient_
from sgtm_kernels.tools.launches import KernelVariant, record_launches
from sgtm_kernels.triton_common.tuning import DTYPES, bucket


def variants() -> list[KernelVariant]:
    """Every block size and flag, at some vocabularies, in bf16, fp16 and fp32."""
    variants: list[KernelVariant] = []
    targets = torch.zeros(4, dtype=torch.int64)[1:]  # a chunk begins anywhere
    for dtype, vocab in product((torch.bfloat16, torch.float16, torch.float32), (37, 4096, 50257, 128256)):
        logits = _logits(torch.empty(3, 1, dtype=dtype), torch.empty(vocab, 1, dtype=dtype), None)
        key = DTYPES[dtype], bucket(vocab, 1, BLOCK)
        for tile, gradient in product(TILE.candidates(*key), (False, True)):
            of_thread = tile.block // (32 * tile.warps)
            launches = record_launches(_softmax_gradient_, logits, targets, gradient, forced={(TILE.name, key): tile})
            variants += [
                replace(
                    launch,
                    widest_bits=min(128, of_thread * 8 * dtype.itemsize),
                    max_subwords=1,  # the target's logit
                    max_below_widest=4,  # with the target, the loss or 0
                    min_programs=max(1, (64 if of_thread <= 8 else 32) // tile.warps),
                )
                for launch in launches
            ]
    return variants
