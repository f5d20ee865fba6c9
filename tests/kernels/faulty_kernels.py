"""Kernels that break a rule of the ahead-of-time suite each, for tests/kernels/test_aot.py; run as a script."""

import json

import triton
import triton.language as tl

from sgtm_kernels.aot import examine
from sgtm_kernels.launch import Launch


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


TYPES = {"x": "*bf16", "y": "*bf16", "n": "i32"}
CASES = {
    "fine": Launch(copy, TYPES, {"B": 128}),
    "does not compile": Launch(unknown_name, TYPES, {"B": 128}),
    "no tensor-core instruction": Launch(copy, TYPES, {"B": 128}, tensor_cores=True),
    "tensor cores": Launch(product, TYPES, {"B": 64}, tensor_cores=True),
    "spills": Launch(product, TYPES, {"B": 128}, num_warps=1, num_stages=1),
    "allowed to spill": Launch(product, TYPES, {"B": 128}, num_warps=1, num_stages=1, spill="to see that one may"),
    "bytes of shared memory": Launch(product, TYPES, {"B": 128}, num_warps=8, num_stages=6),
}

if __name__ == "__main__":
    print(json.dumps({name: examine(launch, 80).problems for name, launch in CASES.items()}))
