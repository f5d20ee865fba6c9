"""Writes docs/results.md, and the results block of README.md, from the committed results files.

    python benchmarks/report.py [--check]

Every number in either comes from benchmarks/results/<device>/*.jsonl. `--check` writes nothing and exits 1 where a
file is not what the results say (tests/unit/test_results.py).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from environment import RESULTS, read_rows

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results: written by benchmarks/report.py -->", "<!-- end of results -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [path for path, text in documents().items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if check:
            print(f"{path} is not what the results files say; run python benchmarks/report.py", file=sys.stderr)
        else:
            path.write_text(documents()[path])
    return int(check and bool(stale))


def documents() -> dict[Path, str]:
    """Text of every document that holds results."""
    paths = sorted(RESULTS.glob("*/*.jsonl"))
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    block = "\n\n".join(section(path, "") for path in paths)
    results = (
        "# Results\n\nWritten by `benchmarks/report.py` from `benchmarks/results/`; do not edit by hand. "
        "How to repeat them stands at the top of each script in `benchmarks/`.\n\n"
    )
    return {
        ROOT / "docs" / "results.md": results + "\n\n".join(section(path, "../") for path in paths) + "\n",
        readme: f"{before}{BEGIN}\n\n{block}\n\n{END}{rest.split(END)[1]}",
    }


def section(path: Path, up: str) -> str:
    """Markdown of one results file; `up` leads from the document to the root of the repository."""
    rows = read_rows(path)
    first = rows[0]
    gpu = {"roofline_share": ops, "flops_utilisation": steps}  # by a key that all rows of a kind have
    kinds = {kind: [row for row in rows if key in row] for key, kind in gpu.items()}
    if any(kinds.values()):
        text = "\n\n".join(kind(found) for kind, found in kinds.items() if found)
    else:
        own = {"step_overhead": step_overhead, "checkpoints": checkpoints}.get(path.stem)
        text = own(rows) if own else runs(path.stem, rows)
    source = (
        f"{first['device']}, {first['threads']} threads, torch {first['versions']['torch']}, commit {first['commit']}, "
        f"{first['time'][:10]} ([{path.name}]({up}{path.relative_to(ROOT).as_posix()}))"
    )
    return f"{text}\n\n{source}"


TITLES = {"novels": "English and Spanish novels", "quickstart": "Quickstart: the embedded stories"}


def runs(name: str, rows: list[dict]) -> str:
    """Test losses in nats per token: the first run full and without each set of domains, its baselines full."""
    categories = list(rows[0]["losses"]["full"])
    table = [["run", "model", *(f"{c}, nats" for c in categories)]]
    for row in rows:
        for removed, losses in row["losses"].items():
            if removed == "full" or row is rows[0]:
                table.append([row["run"], removed, *(f"{losses[c]:.3f}" for c in categories)])
    r = rows[0]
    about = (
        f"{r['parameters']:,} parameters, {r['steps']:,} steps of {r['tokens'] // r['steps']:,} tokens; "
        f"whole test split; {r['seconds'] / 60:.0f} minutes of training for the first run"
    )
    return f"### {TITLES[name]}\n\n{about}.\n\n{markdown(table)}"


def step_overhead(rows: list[dict]) -> str:
    """Step times and memory, relative to the unmasked step of the same code in the same round."""
    table = [["row", "tokens/s", "ratio p20 / p50 / p80", "target", "of", "peak memory ratio"]]
    for r in rows:
        tokens, memory = f"{r['tokens_per_second']:,.0f}", f"{r['memory_ratio']:.3f}"
        table.append([r["row"], tokens, spread(r["ratio"]), r["target"] or "", r["ratio_of"], memory])
    about = (
        f"One training step, AdamW included, {rows[0]['rounds']} interleaved rounds; {rows[0]['setting']}. On a CPU "
        "ours keeps freed memory; Hugging Face's runs as it comes, and once more with freed memory kept."
    )
    return f"### What a masked step costs\n\n{about}\n\n{markdown(table)}"


def checkpoints(rows: list[dict]) -> str:
    """Training time that a checkpoint takes, and its share at each interval."""
    intervals = list(rows[0]["share"])
    table = [
        ["checkpoint", "s lost p20 / p50 / p80", "s paused", "s until in place", *(f"every {n}" for n in intervals)]
    ]
    for r in rows:
        shares = [f"{r['share'][n]:.2%}" for n in intervals]
        table.append(
            [r["checkpoint"], spread(r["lost"]), f"{r['paused']['p50']:.3f}", f"{r['written']['p50']:.2f}", *shares]
        )
    r = rows[0]
    about = (
        f"{r['setting']}, {r['mib']:,.0f} MiB, steps of {r['step']['p50']:.2f} s, {r['rounds']} interleaved rounds; "
        "lost: time compared with the same steps without a checkpoint; every N: share of training time at that "
        "interval. Target: at most 1 % for the asynchronous one."
    )
    return f"### What a checkpoint costs\n\n{about}\n\n{markdown(table)}"


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
        f"{r['versions']['triton']}, driver {r['driver']}; tests on the device: {r.get('tests', 'not run')}."
    )
    return f"### What a masked op costs\n\n{about}\n\n{markdown(table)}"


def steps(rows: list[dict]) -> str:
    """Whole steps of every mixing mode, relative to the unmasked step on the same batches and to plain PyTorch."""
    table = [
        ["shape", "backend", "step", "tokens/s", "ratio p20 / p50 / p80", "target", "to plain", "MFU", "of data sheet",
         "peak MiB", "memory ratio"],
    ]  # fmt: skip
    for r in rows:
        shares = [f"{r[key]['p50']:.1%}" if key in r else "" for key in ("flops_utilisation", "datasheet_utilisation")]
        cells = [
            f"{r['tokens_per_second']:,.0f}",
            spread(r["ratio"]) if "ratio" in r else "",
            f"<= {r['target']:.2f}" if r.get("target") else "",
            f"{r['ratio_public']['p50']:.3f}" if "ratio_public" in r else "",
            *shares,
            f"{r['peak_mib']:,.0f}",
            f"{r['memory_ratio']:.3f}" if "memory_ratio" in r else "",
        ]
        table.append([r["shape"], r["backend"], r["row"] + "*" * bool(r["mean_of"]), *cells])
    speeds = {r["shape"]: r["target_tokens_per_second"] for r in rows if r["target_tokens_per_second"]}
    targets = ", ".join(f"{shape} {speed:,}" for shape, speed in speeds.items())
    rounds = sorted({r["rounds"] for r in rows})
    about = (
        f"Forward, backward and AdamW in {rows[0]['dtype']}, {' or '.join(map(str, rounds))} interleaved rounds "
        "(`benchmarks/steps.py`); ratio: time of the step to that of strategy `none` on the same batches; to plain: "
        "time for a token to that of plain PyTorch, compiled. MFU: of the rate of a big matmul in the same rounds. * "
        "share that comes about over several steps: their mean. Targets for tokens/s unmasked on one H100: "
        f"{targets or 'none'}; tests on the device: {rows[0].get('tests', 'not run')}."
    )
    return f"### What a masked step costs on a GPU\n\n{about}\n\n{markdown(table)}"


def spread(values: dict[str, float]) -> str:
    return " / ".join(f"{values[p]:.3f}" for p in ("p20", "p50", "p80"))


def markdown(table: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


if __name__ == "__main__":
    sys.exit(main())
