"""Everything that wants a GPU: the kernels' tests on it, then what each op costs, into a results file.

    make gpu            or    python benchmarks/gpu.py [--only linear,mlp] [--shape 254m]

Runs on a bare machine: torch, Triton, transformers, numpy and pytest; `sgtm` need not be installed. Where a test is
red it stops there and nothing is timed or written. Otherwise the rows of ops.py go to
results/<device>/<date>_<commit>.jsonl, each with the outcome of the tests. `--only` takes ops, for tests and timings.
Exits 1 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from environment import RESULTS, environment, read_rows

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests" / "kernels"
# Arithmetic on the CPU, and it needs hypothesis.
NOT_ON_A_GPU = ("test_plan.py",)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="ops, e.g. linear,mlp (default: all)")
    parser.add_argument("--shape", default="254m", help="shapes of ops.py, e.g. 124m,llama-1b (default 254m)")
    parser.add_argument("--commit", help="of this code, where it is not a git checkout")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: the committed)")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: no CUDA device here; nothing was run", file=sys.stderr)
        return 1
    where = environment()
    commit = args.commit or where["commit"]
    if not commit:
        parser.error("not a git checkout: name the commit with --commit")
    only = [op for op in args.only.split(",") if op]
    code, outcome = run(test_command(only))
    if code:
        print(f"benchmarks/gpu.py: red tests ({outcome}); nothing was timed, nothing written", file=sys.stderr)
        return code
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "ops.jsonl"
        code, _ = run(ops_command(only, args.shape, measured))
        if code:
            return code
        rows = [{**row, "commit": commit, "tests": outcome} for row in read_rows(measured)]
    path = args.results / slug(where["device"]) / f"{where['time'][:10]}_{slug(commit)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"wrote {path}")
    return 0


def test_command(only: list[str]) -> list[str]:
    """pytest without the plugins that pyproject.toml has options for."""
    files = [TESTS / f"test_{op}.py" for op in only] or sorted(set(TESTS.glob("test_*.py")) - _left_out())
    options = ["-o", "addopts=--import-mode=importlib -ra", "-p", "no:cacheprovider", "-q"]
    return [sys.executable, "-m", "pytest", *options, *map(str, files)]


def _left_out() -> set[Path]:
    return {TESTS / name for name in NOT_ON_A_GPU}


def ops_command(only: list[str], shape: str, to: Path) -> list[str]:
    choice = ["--only", ",".join(only)] if only else []
    return [sys.executable, str(ROOT / "benchmarks" / "ops.py"), *choice, "--shape", shape, "--json", str(to)]


def run(command: list[str]) -> tuple[int, str]:
    """Exit status and last line; what the command prints is shown as it comes."""
    environ = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SGTM_KERNELS")}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), *filter(None, [environ.get("PYTHONPATH")])])
    last = ""
    with subprocess.Popen(
        command, cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode, last


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
