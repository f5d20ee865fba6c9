"""Stage `warm`: compile every kernel that the timed ops launch into Triton's cache, with a pool of processes.

    warm.py ROWS [--cpu] [--only linear,mlp] [--shape 254m,124m,llama-1b] [--jobs N] [--each N]

First every op is called as smoke.py and ops.py call it, with launches recorded instead of run; then the pool compiles
the recorded ones, so that later stages find them in the cache. The list of the ahead-of-time suite (`variants()`) does
not suffice: group boundaries and widths are constants of a kernel, and those of the timed models are
not in that list. A row is an op: how many launches, seconds of compilation, what did not compile.

On a CPU (`--cpu`) kernels are compiled for compute capability 9.0.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
from device import device_of, healthy
from journal import FAILED, OK, Items, Journal
from op_cases import CASES, Inputs
from smoke import BATCH, LENGTH
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from verdicts import MASKS

from sgtm_kernels.tools.shapes import SHAPES, Shape, plans


@dataclass(frozen=True)
class Recorded:
    """One launch as Triton's compiler takes it; `kernel` is the name of the function in `module`."""

    module: str
    kernel: str
    signature: dict
    constants: dict
    attributes: dict
    options: dict

    def source(self) -> ASTSource:
        kernel = getattr(import_module(self.module), self.kernel)
        return ASTSource(kernel, self.signature, self.constants, self.attributes)

    def key(self) -> tuple:
        return (self.module, self.kernel, *map(repr, (self.signature, self.constants, self.attributes, self.options)))


class NoDevice:
    """A driver for a machine without a GPU: what is recorded is for one of compute capability 9.0."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Append each distinct launch to the list instead of running it."""
    by_key: dict[tuple, Recorded] = {}
    compiling, running = JITFunction._do_compile, JITFunction.run

    def record(kernel, key, signature, device, constants, options, attributes, warmup):
        launch = Recorded(kernel.fn.__module__, kernel.fn.__name__, signature, constants, attributes, options.__dict__)
        if launch.key() not in by_key:
            by_key[launch.key()] = launch
            launches.append(launch)

    launches: list[Recorded] = []
    JITFunction._do_compile = record
    JITFunction.run = lambda self, *args, grid, warmup, **kw: running(self, *args, grid=grid, warmup=True, **kw)
    try:
        yield launches
    finally:
        JITFunction._do_compile, JITFunction.run = compiling, running


def launches_of(op: str, shapes: list[Shape], on: torch.device) -> list[Recorded]:
    """What the calls of an op launch: forward and backward, every variant and mask."""
    with recording() as launches:
        for shape in shapes:
            for build in CASES[op].values():
                case = build(shape, Inputs(on, torch.bfloat16))
                for mask, plan in plans(shape).items():
                    if mask in MASKS:
                        case.ours(plan, "triton")()
                del case
                healthy()  # frees
    return launches


def compile_one(launch: Recorded, target: GPUTarget) -> tuple[float, str | None]:
    """Seconds, and the compiler's error or None."""
    began, problem = time.monotonic(), None
    try:
        compile(launch.source(), target=target, options=launch.options)
    except Exception as error:  # whatever the compiler raises is the finding
        problem = f"{launch.kernel}: {type(error).__name__}: {str(error)[:300]}"
    return time.monotonic() - began, problem


def warm(items: Items, pool: Executor, launches_by_op: dict[str, list[Recorded]], target: GPUTarget) -> None:
    """Compile what was recorded, one launch of each op after the other; an op's row is written when all are done."""
    times: dict[str, list[float]] = {op: [] for op in launches_by_op}
    problems: dict[str, list[str]] = {op: [] for op in launches_by_op}
    turns = range(max(map(len, launches_by_op.values()), default=0))
    jobs = [(op, launches[turn]) for turn in turns for op, launches in launches_by_op.items() if turn < len(launches)]
    futures = {pool.submit(compile_one, launch, target): op for op, launch in jobs}
    for future in as_completed(futures):
        op = futures[future]
        seconds, problem = future.result()
        times[op].append(seconds)
        problems[op] += [problem] if problem else []
        if len(times[op]) == len(launches_by_op[op]):
            items.measure(op, lambda op=op: [row(op, target, times[op], problems[op])])


def row(op: str, target: GPUTarget, times: list[float], problems: list[str]) -> dict:
    fields = {"op": op, "arch": target.arch, "launches": len(times), "seconds": round(sum(times), 2)}
    return fields | ({"outcome": FAILED, "error": "; ".join(problems)} if problems else {"outcome": OK})


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--shape", default="254m,llama-1b,124m")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--each", type=int, help="compile at most N launches of each op", metavar="N")
    args = parser.parse_args()
    if args.cpu:
        driver.set_active(NoDevice())
    on, target = device_of(args.cpu), driver.active.get_current_target()
    # As ops.py calls them, and as smoke.py does: the number of tokens is no constant of a kernel, but whether it is a
    # multiple of 16 is, and it decides block sizes.
    shapes = [SHAPES[name] for name in args.shape.split(",")]
    shapes += [replace(s, batch=BATCH, seq_len=min(LENGTH, s.seq_len)) for s in shapes]
    items, launches_by_op = Items(Journal(args.rows), healthy), {}
    for op in args.only.split(","):
        if op in items.finished:
            continue
        try:
            launches_by_op[op] = launches_of(op, shapes, on)[: args.each]
        except Exception as error:
            items.measure(op, lambda error=error: raising(error))
    with ProcessPoolExecutor(args.jobs) as pool:
        warm(items, pool, launches_by_op, target)
    return 0


def raising(error: Exception) -> list[dict]:
    raise error


if __name__ == "__main__":
    sys.exit(main())
