"""Write device, versions and commit of this run to `environment.json` in its folder.

    probe.py FOLDER [--cpu] [--commit NAME]

Without a git checkout, a hash of the sources replaces the commit. Exits 1 if there is no CUDA device (unless `--cpu`),
and 2 if the folder holds rows of another device, version or commit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from journal import ENVIRONMENT

from sgtm_kernels.measurement import environment

ROOT = Path(__file__).parents[2]
SAME = ("device", "commit", "versions", "driver", "cpu")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--commit")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        print("no CUDA device here; --cpu runs every stage on small shapes")
        return 1
    machine = environment() | {"cpu": args.cpu}
    del machine["time"]
    machine["commit"] = args.commit or machine["commit"] or sources()
    if torch.cuda.is_available():
        machine["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        machine["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    path = args.folder / ENVIRONMENT
    if path.exists():
        before = json.loads(path.read_text())
        if differing := [key for key in SAME if before[key] != machine[key]]:
            key = differing[0]
            print(f"{args.folder} holds rows of {key} {before[key]}, this is {machine[key]}; choose another --out")
            return 2
        return 0
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(machine) + "\n")
    os.replace(unfinished, path)
    return 0


def sources() -> str:
    """`source-` and the start of a SHA-256 of all Python files of this code."""
    digest = hashlib.sha256()
    for folder in ("sgtm", "kernels", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return f"source-{digest.hexdigest()[:12]}"


if __name__ == "__main__":
    sys.exit(main())
