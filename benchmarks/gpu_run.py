"""The section of the results of one run of gpu.py: checks, ops, whole steps, and what the GPU did in a step."""

from __future__ import annotations

from collections.abc import Sequence

from journal import last_by
from step_table import steps
from tables import markdown, spread
from verdicts import OPS, admitted, verdicts


def section(rows: Sequence[dict]) -> str:
    """Markdown. Measurements are only those that the checks of the same run admit; what they refuse is named."""
    measured = {
        ops: last_by([row for row in rows if "roofline_share" in row], "variant", "shape", "dtype", "backend", "mask"),
        steps: last_by([row for row in rows if row["stage"] == "steps" and "row" in row], "shape", "backend", "row"),
        profiles: last_by([row for row in rows if "busy_share" in row], "shape", "backend"),
    }
    checks = [row for row in rows if row["stage"] in ("smoke", "tests", "train")]
    parts, refused = [checked(checks)], {}
    for table, candidates in measured.items():
        reported, left_out = admitted(candidates, checks)
        refused |= left_out
        parts += [table(reported)] if any("error" not in row for row in reported) else []
    if refused:
        reasons = "; ".join(f"{what} ({why})" for what, why in refused.items())
        parts.append(f"Not reported, because checks on this device failed or were not run to the end: {reasons}.")
    return "\n\n".join(parts)


def checked(checks: Sequence[dict]) -> str:
    """Verdicts of `smoke` and the kernels' tests on each op, and whether the killed run was bit-identical."""
    backends = [b for b in ("triton", "torch") if any(row.get("backend") == b for row in checks)]
    by_backend = {backend: verdicts(checks, backend) for backend in backends or ["triton"]}
    table = [["op", *(f"against the reference, {backend}" for backend in by_backend), "tests"]]
    for op in OPS:
        each = [by_op[op] for by_op in by_backend.values()]
        table.append([op, *(verdict.smoke for verdict in each), each[0].tests])
    trained = last_by([row for row in checks if "same_bits" in row and row["stage"] == "train"], "zero_stage")
    runs = [
        f"`sgtm train {row['preset']}` under ZeRO {row['zero_stage']}, killed after step {row['killed_after']} and "
        f"resumed after step {row['resumed_after']}: bits {'equal to' if row['same_bits'] else 'differ from'} those of "
        "an uninterrupted run"
        for row in trained
    ]
    return "\n\n".join([f"### Checks on the GPU\n\n{markdown(table)}", *runs])


def profiles(rows: Sequence[dict]) -> str:
    """What the GPU did in an unmasked step."""
    table = [["shape", "backend", "GPU busy", "kernels a step", "ms a step", "longest gap, ms", "most time"]]
    for r in rows:
        gap = f"{r['gaps'][0]['ms']:.3f}" if r["gaps"] else ""
        top = "; ".join(f"`{kernel['name'][:48]}` {kernel['share']:.0%}" for kernel in r["kernels"][:3])
        share, launches, time = f"{r['busy_share']:.1%}", f"{r['launches']:,.0f}", f"{r['milliseconds']:.1f}"
        table.append([r["shape"], r["backend"], share, launches, time, gap, top])
    return f"### What the GPU does in an unmasked step\n\nThree steps under torch.profiler.\n\n{markdown(table)}"


def ops(rows: list[dict]) -> str:
    """Time of each op under each mask, relative to nothing masked, to public code and to the roofline."""
    table = [["op", "shape", "backend", "mask", "us", "to unmasked", "to public", "of the roofline", "public"]]
    for r in rows:
        spreads = [spread(r[key]) if key in r else "" for key in ("ratio_unmasked", "ratio_public")]
        share = f"{r['roofline_share']['p50']:.0%}"
        microseconds = f"{r['microseconds']['p50']:,.0f}"
        table.append([r["variant"], r["shape"], r["backend"], r["mask"], microseconds, *spreads, share, r["public"]])
    r = rows[0]
    about = (
        f"Forward and backward in {r['dtype']}, p50 of the time and p20 / p50 / p80 of the ratios, in interleaved "
        "rounds (`benchmarks/ops.py`); public: the fastest of the public calls, which mask nothing. Roofline: "
        f"{r['roofline']['tflops']['p50']:.0f} TFLOP/s, {r['roofline']['gb_per_second']['p50']:.0f} GB/s. Triton "
        f"{r['versions']['triton']}, driver {r['driver']}."
    )
    return f"### What a masked op costs\n\n{about}\n\n{markdown(table)}"
