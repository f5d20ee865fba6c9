"""Time the candidates of every tunable on this GPU, and write the table that later processes take them from.

    python -m sgtm_kernels.tools.tune [--only attention,linear] [--shape 124m,254m] [--table FILE] [--resume]

The ops run as a model calls them, forward or backward, at the shapes of shapes.py, in bf16; every choice that has
candidates for its key is tried. In each round every candidate takes its turn, in an order that changes. A candidate
replaces the heuristic only if it is faster by more than the noise: if the p80 of its time over the heuristic's of the
same round is below 1; of several, the one with the smallest median of that ratio. Prints what was found and writes
kernels/sgtm_kernels/tuned/<device>.json after every choice; entries of an earlier table that were not measured now are
kept, and with `--resume` none of them is measured again.
Needs torch and Triton, and a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from triton.runtime.errors import OutOfResources

from sgtm_kernels.attention import attention
from sgtm_kernels.cross_entropy import linear_cross_entropy
from sgtm_kernels.linear import linear_in, linear_out
from sgtm_kernels.measurement import cpu_model, environment
from sgtm_kernels.mlp import gelu, swiglu
from sgtm_kernels.plan import MAX_SLICES, MaskPlan, merge_label_runs
from sgtm_kernels.tools.shapes import FORGET, NONE, SGTM, SHAPES, UNLABELED, Shape
from sgtm_kernels.tools.timing import Clock, TimedCall
from sgtm_kernels.triton_common.tuning import Choice, Table, path_of, table_of, trial, written

SHAPE_NAMES = ("124m", "254m", "llama-1b")
SLICES = (64, 256, 1024)  # tokens between two stretches of forget tokens
HEAD_WIDTH = 64  # of the hidden states before the LM head: its matmul is not what is tuned


class RoundTimer(Protocol):
    def rounds(self, calls: Mapping[str, TimedCall], rounds: int, seconds: float) -> dict[str, list[float]]: ...


@dataclass(frozen=True)
class Decision:
    """Result of a choice: the chosen configuration, its median time and the heuristic's, in seconds."""

    config: NamedTuple
    p50: float
    heuristic_p50: float


def tune(
    only: Sequence[str] = (),
    shapes: Sequence[str | Shape] = SHAPE_NAMES,
    table: Path | None = None,
    commit: str | None = None,
    *,
    rounds: int = 40,
    seconds: float = 4.0,
    resume: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    decided: Callable[[Choice, Decision], None] = lambda choice, result: None,
    report: Callable[[str], None] = print,
) -> Path:
    """Tune the ops `only` (default: all that have candidates) on this CUDA device; returns the table that was written.

    shapes   of what is launched, or names of some in shapes.py
    table    where to (default: tuned/<device>.json); commit: of this code, where it is not a git checkout
    rounds   of a choice; fewer, but at least three, where `seconds` are over before
    resume   choices that the table has are not measured
    device   default: the current CUDA device; a CPU only in Triton's interpreter, to try the tuner out
    decided  called with every choice once the table has it

    Raises ValueError without a CUDA device, for an unknown op or shape, and for a table of another device; OSError
    where the table cannot be written, before anything is measured.
    """
    for what, names, known in (("op", only, CASES), ("shape", shapes, SHAPES)):
        if unknown := [name for name in names if isinstance(name, str) and name not in known]:
            raise ValueError(f"unknown {what} {unknown[0]!r}; known: {', '.join(known)}")
    if device is None:
        if not torch.cuda.is_available():
            raise ValueError("tuning needs a CUDA device and there is none here; without a table the heuristics hold")
        device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu_model()
    path = table or path_of(name)
    earlier_entries = entries_of(path, name)
    unfinished_of(path).touch()
    unfinished_of(path).unlink()
    decisions: dict[Choice, Decision] = {}
    measured: dict[Choice, Decision] = {}
    source = {**provenance(), **({"commit": commit} if commit else {})}

    def save(choice: Choice) -> None:
        measured[choice] = decisions[choice]
        write(path, name, earlier_entries, measured, source)
        table_of.cache_clear()
        decided(choice, decisions[choice])

    resumed = earlier_entries if resume else {}
    torch.manual_seed(0)
    for shape in shapes:
        for op in only or CASES:
            for call in CASES[op](SHAPES[shape] if isinstance(shape, str) else shape, device, dtype):
                tune_call(call, Clock(device), decisions, rounds, seconds, report, resumed, save)
    write(path, name, earlier_entries, measured, source)
    table_of.cache_clear()
    report(f"wrote {path}")
    return path


def tune_call(
    call: TimedCall,
    clock: RoundTimer,
    decisions: dict[Choice, Decision],
    rounds: int,
    seconds: float,
    report: Callable[[str], None],
    table: dict[str, dict[str, dict]] | None = None,
    save: Callable[[Choice], None] = lambda choice: None,
) -> None:
    """Decide every choice that a call makes and that is not in `decisions` yet, and add it there.

    table  entries of a table: a choice that it has is taken from there, not measured
    save   called with a choice that was measured
    """
    for choice, candidates, needed in choices(call):
        if choice in decisions or len(candidates) == 1:
            continue
        if before := recalled(table or {}, choice, candidates):
            decisions[choice] = before
            continue
        best = {decided: result.config for decided, result in decisions.items()}
        calls = {str(c): partial(_forced, call, {**best, **needed, choice: c}) for c in candidates}
        times = clock.rounds(calls, rounds, seconds)
        decisions[choice] = result = decide(candidates, [times[str(c)] for c in candidates])
        report(
            f"{choice[0]:26} {written(choice[1]):22} {result.p50 * 1e6:9.1f} us, "
            f"heuristic {result.heuristic_p50 * 1e6:9.1f} us  {result.config}"
        )
        save(choice)


def choices(call: TimedCall) -> list[tuple[Choice, list[NamedTuple], dict[Choice, NamedTuple]]]:
    """Every choice that a call makes: the candidates that this device can launch, and what must be chosen elsewhere for
    it to come up. A choice that comes up under a candidate of another precedes it."""
    seen: set[Choice] = set()
    options = []

    def visit(forced: dict[Choice, NamedTuple]) -> bool:
        with trial(forced) as attempt:
            try:
                call()
            except OutOfResources:
                if not forced:
                    raise
                return False
        for choice, tunable in attempt.tunables.items():
            if choice not in seen:
                seen.add(choice)
                heuristic, *others = tunable.candidates(*choice[1])
                works = [other for other in others if visit({**forced, choice: other})]
                options.append((choice, [heuristic, *works], forced))
        return True

    visit({})
    return options


def recalled(entries: dict[str, dict[str, dict]], choice: Choice, candidates: Sequence[NamedTuple]) -> Decision | None:
    """The table's entry for a choice; None if it has none, or if the entry is no longer a candidate."""
    entry = entries.get(choice[0], {}).get(written(choice[1]))
    for config in candidates:
        if entry and config._asdict() == entry["config"]:
            return Decision(config, *(entry[f"{which}p50_microseconds"] / 1e6 for which in ("", "heuristic_")))
    return None


def decide(candidates: Sequence[NamedTuple], times: Sequence[Sequence[float]]) -> Decision:
    """The rule: times[i][r] is candidate i in round r, the heuristic first."""
    ratios = [sorted(t / base for t, base in zip(each, times[0], strict=True)) for each in times]
    faster = [i for i, ratio in enumerate(ratios) if i > 0 and ratio[-(-8 * len(ratio) // 10) - 1] < 1]
    best = min(faster, key=lambda i: statistics.median(ratios[i]), default=0)
    return Decision(candidates[best], statistics.median(times[best]), statistics.median(times[0]))


def _forced(call: TimedCall, forced: dict[Choice, NamedTuple]) -> None:
    with trial(forced):
        call()


def entries_of(path: Path, device_name: str) -> dict[str, dict[str, dict]]:
    """The entries of a table that is there already. Raises ValueError where it is damaged or of another device."""
    if not path.exists():
        return {}
    if Table(path).device != device_name:
        raise ValueError(f"{path} is the table of {Table(path).device}, this is {device_name}; name another --table")
    return json.loads(path.read_text("utf-8"))["entries"]


def write(path: Path, device_name: str, earlier_entries: dict, decisions: dict[Choice, Decision], source: dict) -> None:
    """The table with what was found, over what it had before."""
    entries = {name: dict(rows) for name, rows in earlier_entries.items()}
    for (name, key), result in decisions.items():
        entries.setdefault(name, {})[written(key)] = {
            "config": result.config._asdict(),
            "p50_microseconds": round(result.p50 * 1e6, 2),
            "heuristic_p50_microseconds": round(result.heuristic_p50 * 1e6, 2),
            **source,
        }
    unfinished = unfinished_of(path)
    unfinished.write_text(json.dumps({"device": device_name, "entries": entries}, indent=1, sort_keys=True) + "\n")
    os.replace(unfinished, path)


def unfinished_of(path: Path) -> Path:
    """The file that is written first and then renamed to `path`; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}")


def provenance() -> dict[str, str | None]:
    """Versions, commit and date of a measurement."""
    machine = environment()
    versions = {name: machine["versions"][name] for name in ("torch", "triton")}
    return versions | {"driver": machine["driver"], "commit": machine["commit"], "date": machine["time"][:10]}


def _random(device: torch.device, dtype: torch.dtype, *size: int) -> torch.Tensor:
    return torch.randn(size, device=device, dtype=dtype).mul_(0.1)


def _directions(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Iterator[TimedCall]:
    """The forward pass alone, then the backward pass alone."""

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return function(x)

    yield forward
    yield _backward(function, x)


def _backward(function: Callable[[torch.Tensor], torch.Tensor], leaf: torch.Tensor) -> TimedCall:
    leaf = leaf.detach().requires_grad_()
    with trial():
        out = function(leaf)
    dy = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaf, dy, retain_graph=True)


def _attention(s: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[TimedCall]:
    plan = MaskPlan.uniform(NONE, UNLABELED, s.batch, s.seq_len)
    qkv = _random(device, dtype, s.batch, s.seq_len, (s.heads + 2 * s.kv_heads) * s.head_dim)
    call = partial(attention, layout=s.layout, plan=plan, scale=s.head_dim**-0.5, backend="triton")
    return _directions(call, qkv)


def _mlp(s: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[TimedCall]:
    plan = MaskPlan.uniform(NONE, UNLABELED, s.batch, s.seq_len)
    bounds = (0, s.neurons - s.forget_neurons, s.neurons)
    x = _random(device, dtype, s.batch, s.seq_len, s.neurons * (1 + s.gated))
    return _directions(lambda x: (swiglu if s.gated else gelu)(x, plan, bounds, "triton"), x)


def _linear(s: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[TimedCall]:
    """The bias sums alone; then dW of both sides, under masks from a few long slices to many short ones."""
    rows, bounds = s.neurons, (0, s.neurons - s.forget_neurons, s.neurons)
    x, h = (_random(device, dtype, s.batch, s.seq_len, columns) for columns in (s.width, rows))
    weight, bias = _random(device, dtype, rows, s.width), _random(device, dtype, rows)
    pure = MaskPlan.uniform(SGTM, FORGET, s.batch, s.seq_len)
    yield _backward(lambda b: linear_in(x, weight, b, pure, "mlp_in", bounds, "triton"), bias)

    def both_sides(plan: MaskPlan) -> TimedCall:
        dw_in = _backward(lambda w: linear_in(x, w, None, plan, "mlp_in", bounds, "triton"), weight)
        dw_out = _backward(lambda w: linear_out(h, w, None, plan, "mlp_out", bounds, "triton"), weight)
        return lambda: [dw_in(), dw_out()]

    for quarters in (1, 2, 3):
        for length in SLICES:
            plan = spread(s, quarters, length)
            if len(plan.label_runs) > 2 * MAX_SLICES:
                yield both_sides(plan)


def spread(s: Shape, quarters: int, length: int) -> MaskPlan:
    """So many quarters of the tokens forget, evenly between stretches of `length` others."""
    forget = max(1, length * quarters // (4 - quarters))
    starts = sorted([*range(0, s.tokens, length + forget), *range(length, s.tokens, length + forget)])
    lengths = [end - start for start, end in pairwise((*starts, s.tokens))]
    labels = [(UNLABELED, FORGET)[i % 2] for i in range(len(lengths))]
    return MaskPlan(SGTM, merge_label_runs(labels, lengths), s.batch, s.seq_len)


def _cross_entropy(s: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[TimedCall]:
    plan = MaskPlan.uniform(NONE, UNLABELED, s.batch, s.seq_len)
    x = _random(device, dtype, s.batch, s.seq_len, HEAD_WIDTH).requires_grad_()
    weight, targets = _random(device, dtype, s.vocab, HEAD_WIDTH), torch.randint(s.vocab, (s.batch, s.seq_len))
    targets = targets.to(device)
    yield lambda: linear_cross_entropy(x, weight, None, targets, plan, 1.0, "triton")


CASES: dict[str, Callable[[Shape, torch.device, torch.dtype], Iterator[TimedCall]]] = {
    "linear": _linear,
    "mlp": _mlp,
    "attention": _attention,
    "cross_entropy": _cross_entropy,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help=f"ops, of {','.join(CASES)} (default: all)")
    parser.add_argument("--shape", default=",".join(SHAPE_NAMES), help=f"of {','.join(SHAPES)}")
    parser.add_argument("--table", type=Path, help="file to write (default: this device's, beside the kernels)")
    parser.add_argument("--commit", help="of this code, where it is not a git checkout")
    parser.add_argument("--resume", action="store_true", help="measure nothing that the table has")
    args = parser.parse_args(arguments)
    only = [op for op in args.only.split(",") if op]
    try:
        tune(only, args.shape.split(","), args.table, args.commit, resume=args.resume)
    except (ValueError, OSError) as error:
        print(f"sgtm_kernels.tools.tune: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
