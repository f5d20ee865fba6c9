"""Stage `smoke`: every op at the widths of real models, against the reference in fp64.

    smoke.py ROWS [--cpu] [--only linear,mlp] [--shape 254m,llama-1b]

Forward and backward of each op of op_cases.py under four masks, in bf16 (AdamW in fp32), in memory poisoned with NaN.
The largest error of each result may be `FACTOR` times that of the reference in the same dtype, and rows that are zero
in the reference must be exactly zero. Four sequences of at most 1,024 tokens, so that the reference fits. A row is one
op under one mask in one backend; `same_bits` is whether a second call gave the same bits.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from device import backends, device_of, healthy
from journal import FAILED, OK, Items, Journal
from op_cases import CASES, Inputs, OpCase
from verdicts import MASKS, smoke_item

from sgtm_kernels.accuracy import compare
from sgtm_kernels.plan import MaskPlan
from sgtm_kernels.tools.shapes import SHAPES, Shape, plans

import torch  # isort: skip

BATCH, LENGTH = 4, 1024
FACTOR = 4.0  # tests/kernels hold 2 on small shapes; these are maxima over some ten million entries


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--shape", default="254m,llama-1b")
    args = parser.parse_args()
    on, items = device_of(args.cpu), Items(Journal(args.rows), healthy)
    torch.backends.cuda.matmul.allow_tf32 = False
    for name in args.shape.split(","):
        shape = replace(SHAPES[name], batch=BATCH, seq_len=min(LENGTH, SHAPES[name].seq_len))
        for op in args.only.split(","):
            for variant, build in CASES[op].items():
                if variant == "linear_gelu" and shape.gated:
                    continue
                check_variant(items, op, variant, name, shape, build, on)
    return 0


def check_variant(items: Items, op: str, variant: str, name: str, shape: Shape, build: Callable, on) -> None:
    """All masks in all backends; inputs are made only if an item is unfinished, references once for each mask."""
    case = None
    for mask, plan in plans(shape).items():
        known: dict[torch.dtype, dict] = {}
        for backend, dtype in backends() if mask in MASKS else ():
            item = smoke_item(variant, name, mask, backend)

            def measured(backend=backend, dtype=dtype, mask=mask, plan=plan, known=known) -> list[dict]:
                nonlocal case
                began = time.monotonic()
                if case is None:
                    torch.manual_seed(0)
                    case = build(shape, Inputs(on, torch.bfloat16))
                head = {"op": op, "variant": variant, "shape": name, "mask": mask, "backend": backend}
                verdict = check(case, plan, backend, dtype, known)
                return [head | {"dtype": str(dtype).removeprefix("torch.")} | verdict | _seconds(began)]

            items.measure(item, measured)


def _seconds(began: float) -> dict:
    return {"seconds": round(time.monotonic() - began, 3)}


def check(case: OpCase, plan: MaskPlan, backend: str, dtype: torch.dtype, known: dict) -> dict:
    """Errors and their budgets by name of the result, and whether all are within them.

    known  results of the reference by dtype, kept for the other backends
    """
    for precision in (torch.float64, dtype):
        if precision not in known:
            known[precision] = case.results(plan, "reference", precision)
    ours = case.results(plan, backend, dtype)
    again = case.results(plan, backend, dtype)
    same = all(torch.equal(ours[name], again[name]) for name in ours)
    del again
    results, wrong = {}, []
    for name, actual in ours.items():
        results[name] = compared(actual, known[dtype][name], known[torch.float64][name])
        if not results[name]["ok"]:
            wrong.append(f"{name}: {results[name]}")
    verdict = {"outcome": FAILED if wrong else OK, "results": results, "same_bits": same}
    return verdict | ({"error": "; ".join(wrong)[:1000]} if wrong else {})


def compared(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> dict:
    comparison = compare(actual, plain, exact, FACTOR)
    return {"ok": comparison.ok, **comparison._asdict()}


if __name__ == "__main__":
    sys.exit(main())
