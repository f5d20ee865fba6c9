"""Writes docs/results.md, and the results block of README.md, from the committed results files.

    python benchmarks/report.py [--check] [--add DIR]

Every number in either comes from benchmarks/results/<device>/*.jsonl. `--check` writes nothing and exits 1 where a
file is not what the results say (tests/unit/test_results.py). `--add` takes the rows of a run of gpu.py from DIR into
benchmarks/results/<device>/<date>_<commit>.jsonl first. Measurements of an op whose checks failed in that run, or were
not run, are left out of both documents (verdicts.py), which say so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import gpu_run
from environment import RESULTS, read_rows
from journal import ENVIRONMENT
from step_table import steps
from tables import markdown, spread

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results: written by benchmarks/report.py -->", "<!-- end of results -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--add", type=Path, metavar="DIR", help="the --out of a run of gpu.py")
    args = parser.parse_args()
    check = args.check
    if args.add:
        print(f"wrote {add(args.add)}")
    stale = [path for path, text in documents().items() if not path.exists() or path.read_text() != text]
    for path in stale:
        if check:
            print(f"{path} is not what the results files say; run python benchmarks/report.py", file=sys.stderr)
        else:
            path.write_text(documents()[path])
    return int(check and bool(stale))


def add(folder: Path) -> Path:
    """The rows of a run of gpu.py as one committed results file. Raises ValueError for a run on a CPU."""
    from gpu_stages.summary import rows_of

    rows = rows_of(folder)
    if not rows or not (folder / ENVIRONMENT).exists():
        raise ValueError(f"{folder} holds no rows of a run of gpu.py")
    here = json.loads((folder / ENVIRONMENT).read_text())
    if here["cpu"]:
        raise ValueError(f"{folder} is a run with --cpu, whose times mean nothing")
    path = RESULTS / slug(here["device"]) / f"{rows[0]['time'][:10]}_{slug(here['commit'])}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row | {"commit": here["commit"]}) + "\n" for row in rows))
    return path


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


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
    if "stage" in first:
        text = gpu_run.section(rows)
    else:
        own = {"steps": steps, "checkpoints": checkpoints}.get(path.stem)
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


if __name__ == "__main__":
    sys.exit(main())
