"""The novels: SGTM against no filter and against filtered data, on the same steps.

    python benchmarks/novels.py [--runs runs] [--json FILE] [--collect]

Trains the three recipes in launch/recipes/ one after the other on the data prepared with `novels.rules.yaml`, evaluates
each on the whole test split, and writes one JSON object per run with the losses of every category. A run that was cut
off is resumed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from environment import write_rows

RECIPES = Path(__file__).parent.parent / "launch" / "recipes"
NAMES = ("novels", "novels-no-filter", "novels-filtered")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--json", type=Path, help="write one JSON object per run")
    parser.add_argument("--collect", action="store_true", help="the runs are trained and evaluated already")
    args = parser.parse_args()
    rows = []
    for name in NAMES:
        run = args.runs / name
        if not args.collect:
            sgtm("train", str(RECIPES / f"{name}.yaml"), "--resume", "--runs", str(args.runs))
            sgtm("eval", str(run))
            sgtm("report", str(run))
        rows.append({"run": name, **json.loads((run / "summary.json").read_text())})
    if args.json:
        write_rows(args.json, rows)


def sgtm(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "sgtm", *arguments], check=True)


if __name__ == "__main__":
    main()
