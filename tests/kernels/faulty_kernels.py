"""Kernels that break a rule of the ahead-of-time suite each, for tests/kernels/test_aot.py; run as a script."""

import json

import triton
import triton.language as tl

from sgtm_kernels.tools.aot import examine
from sgtm_kernels.tools.launches import KernelVariant


@triton.jit
def copy(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def unknown_name(x, y, n, B: tl.constexpr):
    tl.store(y + tl.arange(0, B), tl.load(x + nowhere))  # noqa: F821


@triton.jit
def product(x, y, n, B: tl.constexpr):
    i, j = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
    total = tl.zeros((B, B), tl.float32)
    for k in range(0, n, B):
        total = tl.dot(tl.load(x + i * n + k + j), tl.load(x + (k + i) * n + j), total)
    tl.store(y + i * B + j, total)


@triton.jit
def masked_by_content(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    wanted = tl.load(y + i, mask=i < n, other=0.0) != 0.0
    tl.store(y + i, tl.load(x + i, mask=wanted, other=0.0), mask=i < n)


@triton.jit
def sum_of_some(x, y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y, tl.sum(tl.load(x + i, mask=i < n, other=0.0)))


TYPES = {"x": "*bf16", "y": "*bf16", "n": "i32"}
CASES = {
    "fine": KernelVariant(copy, TYPES, {"B": 1024}),
    "narrow accesses": KernelVariant(masked_by_content, TYPES, {"B": 1024}),
    "narrow rows": KernelVariant(masked_by_content, TYPES, {"B": 1024}, max_subwords=16),
    "accesses narrower than 128 bits": KernelVariant(
        sum_of_some, TYPES, {"B": 1024}, max_subwords=16, max_below_widest=0
    ),
    "few narrower accesses": KernelVariant(sum_of_some, TYPES, {"B": 1024}, max_subwords=16, max_below_widest=1),
    "accesses of 128 bits": KernelVariant(copy, TYPES, {"B": 1024}, min_wide_words=8),
    "widest access": KernelVariant(copy, TYPES, {"B": 128}),
    "HGMMA of": KernelVariant(product, TYPES, {"B": 64}, tensor_cores=True, hgmma_columns=(128,)),
    "columns of HGMMA": KernelVariant(product, TYPES, {"B": 64}, tensor_cores=True, hgmma_columns=(64,)),
    "programs at once": KernelVariant(copy, TYPES, {"B": 1024}, min_programs=32),
    "some programs": KernelVariant(copy, TYPES, {"B": 1024}, min_programs=8),
    "bytes of stack": KernelVariant(
        product, TYPES, {"B": 128}, num_warps=1, num_stages=1, spill="on another architecture", spill_on=(80,)
    ),
    "does not compile": KernelVariant(unknown_name, TYPES, {"B": 128}),
    "no tensor-core instruction": KernelVariant(copy, TYPES, {"B": 1024}, tensor_cores=True),
    "tensor cores": KernelVariant(product, TYPES, {"B": 64}, tensor_cores=True),
    "spills": KernelVariant(product, TYPES, {"B": 128}, num_warps=1, num_stages=1),
    "allowed to spill": KernelVariant(product, TYPES, {"B": 128}, num_warps=1, num_stages=1, spill="for a test"),
    "bytes of shared memory": KernelVariant(product, TYPES, {"B": 128}, num_warps=8, num_stages=6),
}

if __name__ == "__main__":
    outcomes = examine(list(CASES.values()), 90)
    print(json.dumps({name: outcome.problems for name, outcome in zip(CASES, outcomes, strict=True)}))
