"""What attention's kernels are launched as, and what their machine code must have."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch

from sgtm_kernels.attention.flash import attention_backward_keys, attention_backward_queries, attention_forward
from sgtm_kernels.attention.kernel import ONE_COPY, TILES, _backward, _columns, _forward, _half, _rotated, width_of
from sgtm_kernels.attention.op import HeadLayout
from sgtm_kernels.plan import MaskPlan
from sgtm_kernels.tools.launches import KernelVariant, plan_of, record_launches
from sgtm_kernels.triton_common.tuning import DTYPES

SPILL = {  # why registers may spill, and where: in heuristics by dtype, kernel and width of a head
    ("bf16", attention_forward, 128): (
        "up to 16 bytes; half the keys spill none but halve the products",
        (80, 90, 100),
    ),
    ("fp32", attention_forward, 128): ("16 bytes; there are no smaller blocks", (90,)),
    ("bf16", attention_backward_queries, 64): ("16 bytes; half the queries halve sm_90's products", (100,)),
    ("bf16", attention_backward_queries, 128): ("up to 64 bytes; half the queries halve sm_90's products", (80, 100)),
    ("bf16", attention_backward_keys, 16): ("112 bytes; what spills none is too small for sm_90", (100,)),
    ("bf16", attention_backward_keys, 32): ("up to 136 bytes; what spills none is too small for sm_90", (100,)),
    # On sm_90 with documents where nothing is masked: 72 to 88 bytes.
    ("bf16", attention_backward_keys, 64): ("up to 264 bytes; what spills none is too small for sm_90", (80, 90, 100)),
    ("bf16", attention_backward_keys, 128): ("8 bytes on sm_90 with heads of 96, up to 464 elsewhere", (80, 90, 100)),
    ("fp32", attention_backward_keys, 64): ("16 bytes where nothing is masked; smaller blocks do less per load", (90,)),
}


def variants() -> list[KernelVariant]:
    """Every block size at some widths of a head, bare and with all masks, and in the common one every flag, in bf16 and
    fp32. Candidates besides the heuristic in the head sizes that fill their width."""
    variants: list[KernelVariant] = []
    half_and_full, seq_len = (torch.bfloat16, torch.float32), 300
    for head_dim in (8, 24, 32, 64, 96, 128):
        plain, grouped = HeadLayout((32,), (32,), head_dim), HeadLayout((24, 0, 8), (6, 0, 2), head_dim)
        others = head_dim in (32, 64)
        variants += _variants(torch.bfloat16, plain, plan_of(1, seq_len), None, others)
        for dtype in half_and_full:
            variants += _variants(dtype, grouped, plan_of(3, seq_len, active=0.5, documents=True), 256, others)
            flags = ((False, True), (False, False), (True, True)) if head_dim in (24, 64, 128) else ()
            x = torch.empty(1, seq_len, _columns(grouped)["STRIDE"], dtype=dtype)
            angles = torch.empty(seq_len, head_dim)
            for backward, in_place in flags:
                to = x if in_place else torch.empty_like(x)
                programs = 4 if _half(grouped) <= 32 else 2
                launches = record_launches(_rotated, x, to, grouped, angles, angles, backward)
                variants += [replace(launch, min_programs=programs) for launch in launches]
    for dtype, window, documents, active in product(half_and_full, (None, 256), (False, True), (1.0, 0.0, 0.5)):
        plan = plan_of(2, seq_len, active=active, documents=documents)
        variants += _variants(dtype, HeadLayout((24, 8), (6, 2), 64), plan, window)
    return variants


# Tiles of queries' rows and of keys' rows that a kernel reads and writes, each once at least.
TILES_OF = {
    attention_forward: (2, 2),  # q, out; k, v
    attention_backward_queries: (4, 2),  # q, dy, out, dq; k, v
    attention_backward_keys: (2, 4),  # q, dy; k, v, dk, dv
}


def _variants(
    dtype: torch.dtype, layout: HeadLayout, plan: MaskPlan, window: int | None, others: bool = False
) -> list[KernelVariant]:
    qkv = torch.empty(1, plan.seq_len, _columns(layout)["STRIDE"], dtype=dtype)
    half, variants = dtype == torch.bfloat16, []

    def there_and_back() -> None:
        out, lse, _ = _forward(qkv, None, None, plan, layout, 0.125, window)
        _backward(out, qkv, out, lse, None, None, plan, layout, 0.125, window, (True,))

    for kernel, tunable in TILES.items():
        width = width_of(layout)
        key = DTYPES[dtype], width
        for i, size in enumerate(tunable.candidates(*key)[: None if others else 1]):
            spill, spill_on = SPILL.get((DTYPES[dtype], kernel, width), (None, ())) if i == 0 else (None, ())
            scores = size.queries if kernel is attention_backward_keys else size.keys
            of_thread = min(size.queries, size.keys) * width // (32 * size.warps)
            queries, keys = TILES_OF[kernel]
            variants += [
                replace(
                    launch,
                    tensor_cores=half,
                    hgmma_columns=tuple(sorted({scores, width})) if half and i == 0 and ONE_COPY else None,
                    widest_bits=min(128, of_thread * 8 * dtype.itemsize),
                    min_wide_words=KernelVariant.words(
                        (queries * size.queries + keys * size.keys) * width, dtype, size.warps
                    ),
                    min_programs=2 if half and size.warps == 4 else 1,
                    spill=spill,
                    spill_on=spill_on,
                )
                for launch in record_launches(there_and_back, forced={(tunable.name, key): size})
                if launch.kernel is kernel
            ]
    return variants
