"""Everything that needs a GPU, in one run within a time budget: checks, then the cost of each op and of a whole step.

    make gpu      or      python benchmarks/gpu.py --out DIR [--budget 540] [--only smoke,steps,attention]

Stages, most important first, each within a share of the budget (gpu_stages/stages.py); unused time passes on:

    rates    copy in GB/s, a large matmul in TFLOP/s
    warm     all kernels that the timed ops launch, compiled by a pool of processes
    smoke    every op at the widths of real models against the reference, in NaN-poisoned memory, under four masks
    profile  three unmasked steps: share of the time that the GPU is busy, gaps, top kernels
    steps    whole training steps against plain compiled PyTorch, in the mixing modes (steps.py)
    ops      every op against the best public equivalents (ops.py)
    tune     block sizes, written to DIR/tuned.json after every choice
    tests    tests/kernels, a row for each file
    train    `sgtm train` under ZeRO 1 and 3, killed and resumed, where its packages are installed

Rows are appended to DIR/<stage>*.jsonl and synced as they are measured; a failure becomes a row and stops nothing else.
A second run with the same DIR skips what is finished, so a run may be killed at any moment; `--again` repeats what
failed. `python benchmarks/report.py --add DIR` adds the results to the committed ones and to docs/performance.md,
except those of an op whose checks failed.

Needs torch, Triton, numpy and pytest. `--cpu` runs every stage on small shapes, Triton's kernels in its interpreter.
Exits 1 if there is no GPU or another run uses DIR, 2 if an argument is invalid or DIR holds rows of another device,
version or commit, 128 + N after signal N; otherwise 0, failed rows or not.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from arguments import one_of
from gpu_stages import summary
from gpu_stages.driver import Driver, Ended, Processes, Stage, Unit
from gpu_stages.stages import HERE, NAMES, OPS, stages

BEGAN = time.monotonic()
PROBE = 90  # seconds at most to import torch and find the device
LOCK = 10  # seconds to wait for the processes of a killed run to end


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with locked(args.out) as lock:
        execute = Processes(args.out, lock)
        flags = ["--cpu"] * args.cpu + (["--commit", args.commit] if args.commit else [])
        ended = execute(
            Stage("probe", "", 1, []),
            Unit("all", lambda limit: [sys.executable, str(HERE / "probe.py"), str(args.out), *flags], "probe.jsonl"),
            min(PROBE, args.budget),
        )
        if problem := problem_of(ended):
            print(f"benchmarks/gpu.py: {problem}", file=sys.stderr)
            return ended.code or 1
        chosen = [name for name in args.only if name in NAMES]
        ops = [name for name in args.only if name in OPS]
        if ops and not chosen:
            chosen = ["warm", "smoke", "ops", "tests"]
        driver = Driver(args.out, args.budget, began=BEGAN, again=args.again, execute=execute, write=write)
        driver.run(stages(args.out, cpu=args.cpu, only=chosen, ops=ops))
        write(summary.text(args.out))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--budget", type=seconds, default=540.0, help="seconds for all stages (default 540)")
    known = (*NAMES, *OPS)
    parser.add_argument("--only", type=one_of(known), default=[], help=f"stages and ops, of {','.join(known)}")
    parser.add_argument("--cpu", action="store_true", help="every stage on small shapes, without a GPU")
    parser.add_argument("--again", action="store_true", help="repeat what failed in an earlier run")
    parser.add_argument(
        "--commit", help="of this code, where it is not a git checkout (default: a hash of the sources)"
    )
    return parser.parse_args(arguments)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def problem_of(ended: Ended) -> str | None:
    if ended.code == 0:
        return None
    if ended.cut:
        return f"importing torch and finding the device took longer than {PROBE} s"
    return (ended.tail.strip().splitlines() or [f"the probe ended with {ended.code}"])[-1]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """One run at a time in a folder. The stages' processes inherit the lock, so those of a killed run have ended when
    this returns. Raises SystemExit if another run holds it for more than `LOCK` seconds."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    ends = time.monotonic() + LOCK
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > ends:
                    raise SystemExit(f"benchmarks/gpu.py: another run is writing to {folder}") from None
                time.sleep(0.05)
        yield lock
    finally:
        os.close(lock)


def write(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
