"""Everything that wants a GPU: the kernels' tests on it, then what each op and a whole step cost, into a results file.

    make gpu            or    python benchmarks/gpu.py [--only linear,mlp,steps] [--shape 254m]

Runs on a bare machine: torch, Triton, transformers, numpy and pytest; `sgtm` need not be installed. Where a test is
red it stops there and nothing is timed or written. Otherwise the rows of ops.py and of steps.py go to
results/<device>/<date>_<commit>.jsonl, each with the outcome of the tests; where one of the two fails, those of the
one before. `--only` takes ops, for tests and timings, and `steps`, which needs the tests of all ops. Exits 1 where
there is no GPU.
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
from arguments import one_of
from environment import RESULTS, environment, read_rows

from sgtm_kernels.dispatch import OPS

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests" / "kernels"
# Arithmetic on the CPU, which needs hypothesis; compilation for all architectures, which takes longer than the rest.
NOT_ON_A_GPU = ("test_plan.py", "test_aot.py")
STEPS = "steps"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = (*OPS, STEPS)
    parser.add_argument("--only", type=one_of(known), default=[], help=f"of {','.join(known)} (default: all)")
    parser.add_argument("--shape", default="", help="e.g. 124m,llama-1b (default: 254m for ops, all for steps)")
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
    only = args.only
    ops = [name for name in only if name != STEPS]
    code, outcome = run(test_command([] if STEPS in only else ops))
    if code:
        print(f"benchmarks/gpu.py: red tests ({outcome}); nothing was timed, nothing written", file=sys.stderr)
        return code
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for command in [ops_command] * bool(ops or not only) + [steps_command] * (STEPS in only or not only):
            measured = Path(folder) / "rows.jsonl"
            code, _ = run(command(ops, args.shape, measured))
            if code:
                print(f"benchmarks/gpu.py: {command.__name__} ended with {code}", file=sys.stderr)
                break
            rows += [{**row, "commit": commit, "tests": outcome} for row in read_rows(measured)]
    if not rows:
        return code
    path = args.results / slug(where["device"]) / f"{where['time'][:10]}_{slug(commit)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"wrote {path}")
    return code


def test_command(only: list[str]) -> list[str]:
    """pytest without the plugins that pyproject.toml has options for."""
    files = [file for op in only for file in sorted(TESTS.glob(f"test_{op}*.py"))]
    files = files or sorted(set(TESTS.glob("test_*.py")) - _left_out())
    options = ["-o", "addopts=--import-mode=importlib -ra", "-p", "no:cacheprovider", "-q"]
    return [sys.executable, "-m", "pytest", *options, *map(str, files)]


def _left_out() -> set[Path]:
    return {TESTS / name for name in NOT_ON_A_GPU}


def ops_command(only: list[str], shape: str, to: Path) -> list[str]:
    choice = ["--only", ",".join(only)] if only else []
    return [*_script("ops.py"), *choice, "--shape", shape or "254m", "--json", str(to)]


def steps_command(only: list[str], shape: str, to: Path) -> list[str]:
    return [*_script("steps.py"), *(["--shape", shape] if shape else []), "--json", str(to)]


def _script(name: str) -> list[str]:
    return [sys.executable, str(ROOT / "benchmarks" / name)]


def run(command: list[str]) -> tuple[int, str]:
    """Exit status and last line; what the command prints is shown as it comes."""
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("SGTM_")}
    paths = [str(ROOT / "kernels"), str(ROOT), *filter(None, [environ.get("PYTHONPATH")])]
    environ["PYTHONPATH"] = os.pathsep.join(paths)
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
