"""What each masked op costs: against the same code with nothing masked, against public code, and of the roofline.

    python benchmarks/ops.py [--only linear,mlp] [--backend torch,triton] [--shape 254m] [--mask MASK,...] [--json FILE]

For every op, forward and backward of one layer: in every round each call takes its turn, ours under each
mask and the public ones, so that ratios are of times of the same round. A row is one mask in one backend:

    microseconds     of one call
    ratio_unmasked   to the same backend with strategy `none`
    ratio_public     to the fastest of the public calls (which do not mask anything)
    roofline_share   of the time that the work left by the mask would take at the rates of a big matmul and a device
                     copy, timed in the same rounds

each as p20/p50/p80. On CUDA with events. `--only` takes ops, `--backend` those to compare (by default all that run
here); the masks are in sgtm_kernels/tools/shapes.py, the work in op_cases.py. The rows of a variant are appended to
FILE as soon as it is measured; a variant that has rows there is not measured again, and one that fails gets a row that
says so. Needs nothing but torch, numpy and `sgtm_kernels`.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec

import numpy as np
import torch
from arguments import FAST, add_measuring, one_of
from environment import environment, healthy, percentiles
from journal import ENVIRONMENT, FAILED, Items, Journal
from op_cases import CASES, Inputs, OpCase, forget_share
from roofline import COPY, MATMUL, Roofline

from sgtm_kernels.dispatch import module_name, unusable
from sgtm_kernels.tools.shapes import SHAPES, Shape, plans
from sgtm_kernels.tools.timing import Clock

BASE = "unmasked"
SLOW = ("attention, window", "attention, documents")  # whose public calls compile longest: last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=one_of(CASES), default=list(CASES), help=f"ops, of {','.join(CASES)}")
    add_measuring(parser, "op", rounds=40, seconds=8)
    parser.add_argument("--shape", type=one_of(SHAPES), default=["254m"], help=f"of {','.join(SHAPES)} (default 254m)")
    known = list(plans(SHAPES["254m"]))
    parser.add_argument(
        "--mask", type=one_of(known), default=known, help=f"of {','.join(known)}; {BASE} always".replace("%", "%%")
    )
    args = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    for backend in args.backend or ():
        for op in args.only:
            if problem := missing(op, backend):
                parser.error(f"--backend {backend}: {problem}")
    torch.manual_seed(0)
    clock, roofline, items = Clock(args.device), Roofline(args.device, dtype), items_of(args)
    failed = False
    for name in args.shape:
        variants = [(op, variant, build) for op in args.only for variant, build in CASES[op].items()]
        for op, variant, build in sorted(variants, key=lambda entry: entry[1] in SLOW):  # stable

            def rows(op=op, variant=variant, build=build, name=name) -> list[dict]:
                shape, backends = SHAPES[name], [b for b in args.backend or FAST if not missing(op, b)]
                measured = measure(build(shape, Inputs(args.device, dtype)), shape, backends, clock, roofline, args)
                show(f"{variant}, {name}, {args.dtype}", measured)
                head = {"op": op, "variant": variant, "shape": name, "dtype": args.dtype}
                return [head | row for row in measured]

            outcomes = items.measure(f"{variant}, {name}, {args.dtype}", rows)
            failed |= any(row["outcome"] == FAILED for row in outcomes)
            healthy()  # frees
    return int(failed)


def items_of(args: argparse.Namespace) -> Items:
    """Rows go to `--json`, with the environment beside it where a run wrote one, else with that of this process."""
    if args.json is None:
        return Items(None, healthy)
    beside = args.json.parent / ENVIRONMENT
    return Items(Journal(args.json, None if beside.exists() else environment()), healthy)


def missing(op: str, backend: str) -> str | None:
    """Why this backend of the op cannot be timed here, or None."""
    if problem := unusable(backend):
        return problem
    return None if find_spec(module_name(op, backend)) else f"op {op!r} has no backend {backend!r}"


def measure(case: OpCase, shape: Shape, backends: list[str], clock: Clock, roofline: Roofline, args) -> list[dict]:
    """Rows of one op: the public calls, then every backend under every mask."""
    masks = {mask: plan for mask, plan in plans(shape).items() if mask in (BASE, *args.mask)}
    ours = {(backend, mask): case.ours(plan, backend) for backend in backends for mask, plan in masks.items()}
    public = {name: call for name, call in case.public.items() if works(name, call)}
    times = clock.rounds({**public, **ours, **roofline.calls}, args.rounds, args.seconds)
    best = min(public, key=lambda name: np.median(times[name]))
    peaks = [{key: times[key][i] for key in (MATMUL, COPY)} for i in range(len(times[COPY]))]
    rates = {name: percentiles(values) for name, values in roofline.rates(times).items()}

    def row(key, plan, **what) -> dict:
        ideal = [roofline.ideal(*case.work(plan), peak) for peak in peaks]
        return what | {
            "microseconds": percentiles(1e6 * np.array(times[key])),
            "ratio_public": _ratio(times[key], times[best]),
            "public": best,
            "roofline_share": _ratio(ideal, times[key]),
            "roofline": rates,
            "forget_share": round(forget_share(plan), 4),
            "rounds": len(times[key]),
        }

    rows = [row(name, masks[BASE], backend="public", mask=name) for name in public]
    for backend, mask in ours:
        of = {"ratio_unmasked": _ratio(times[backend, mask], times[backend, BASE])}
        rows.append(row((backend, mask), masks[mask], backend=backend, mask=mask) | of)
    return rows


def works(name: str, call) -> bool:
    """False, with a line on stderr, if the public call raises, as for a head size that it does not support."""
    try:
        call()
    except (RuntimeError, NotImplementedError) as error:
        print(f"left out: {name}: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    return True


def _ratio(times: list[float], of: list[float]) -> dict[str, float]:
    return percentiles(np.array(times) / np.array(of))


def show(title: str, rows: list[dict]) -> None:
    rates = rows[0]["roofline"]
    print(
        f"\n{title}: {rows[0]['rounds']} rounds; matmul {rates['tflops']['p50']:.4g} TFLOP/s, "
        f"copy {rates['gb_per_second']['p50']:.4g} GB/s; ratios p20 / p50 / p80, public: {rows[0]['public']}"
    )
    print(f"{'backend':8} {'mask':32} {'us':>10}  {'to unmasked':22} {'to public':22} {'of the roofline':16}")
    for r in rows:
        spread = [" / ".join(f"{v:.3f}" for v in r.get(k, {}).values()) for k in ("ratio_unmasked", "ratio_public")]
        share = f"{r['roofline_share']['p50']:.1%}"
        print(
            f"{r['backend']:8} {r['mask']:32} {r['microseconds']['p50']:10.1f}  {spread[0]:22} {spread[1]:22} {share}"
        )


if __name__ == "__main__":
    sys.exit(main())
