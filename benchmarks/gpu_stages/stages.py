"""The stages of benchmarks/gpu.py, most important first, with their shares of the budget."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import verdicts
from journal import Items, Journal
from verdicts import MASKS, VARIANTS

from gpu_stages.driver import BENCHMARKS, Stage, Unit

TESTS = BENCHMARKS.parent / "tests" / "kernels"
HERE = Path(__file__).parent
# Arithmetic on the CPU, which needs hypothesis; compilation for all architectures, which takes longer than the rest.
NOT_ON_A_GPU = ("test_plan.py", "test_aot.py")
ON_A_CPU = ("test_arguments.py", "test_dispatch.py")
_ORDER = ("attention", "cross_entropy", "linear", "mlp", "norm", "adamw", "embedding")  # most of a step first
OPS = tuple(sorted(verdicts.OPS, key=lambda op: _ORDER.index(op) if op in _ORDER else len(_ORDER)))
SHAPES = ("254m", "124m", "llama-1b")
NAMES = ("rates", "warm", "smoke", "profile", "steps", "ops", "tune", "tests", "train")
# Seconds of 540. On a CPU other things take long: Triton's interpreter, and starting processes.
ON_GPU_SHARES = (15, 40, 45, 25, 145, 105, 50, 55, 60)
CPU_SHARES = (30, 70, 120, 40, 60, 70, 30, 60, 60)
PACKAGES = (  # what `sgtm train` needs
    "deepspeed", "transformers", "tokenizers", "pyarrow", "safetensors", "zstandard", "pydantic", "yaml",
    "rich", "psutil", "jinja2", "matplotlib",
)  # fmt: skip
WORKERS = 12  # of the tests
INTERPRET = {"TRITON_INTERPRET": "1"}


def stages(folder: Path, *, cpu: bool = False, only: Collection[str] = (), ops: Collection[str] = ()) -> list[Stage]:
    """What gpu.py runs into `folder`; `only`: stages by name, `ops`: those that smoke, ops, tests and tune are of."""
    make = _Commands(folder, cpu, [op for op in OPS if op in ops] or list(OPS))
    all_stages = [
        Stage(name, title, share, units, parallel, item)
        for (name, title, units, parallel, item), share in zip(
            make.all(), CPU_SHARES if cpu else ON_GPU_SHARES, strict=True
        )
    ]
    if any(find_spec(name) is None for name in PACKAGES):
        all_stages[-1] = replace(all_stages[-1], share=8.0)  # it only reports them, and leaves its time to the others
    return [stage for stage in all_stages if not only or stage.name in only]


class _Commands:
    def __init__(self, folder: Path, cpu: bool, ops: list[str]):
        self.folder, self.cpu, self.ops = folder, cpu, ops
        self.environ = INTERPRET if cpu else {}

    def all(self) -> list[tuple]:
        """(name, title, units, units at a time, share of the limit that one item may take) of each stage."""
        names = ",".join(self.ops)
        small = ["--shape", "tiny"] if self.cpu else []
        smoke = [self._script("smoke", op, "smoke.py", "--only", op, *small) for op in self.ops]
        warm = ["--only", names, *(["--shape", "tiny", "--each", "1"] if self.cpu else [])]
        shapes, shape = ("tiny",) if self.cpu else SHAPES, self._shape()
        tests = [self._tests("ops", self._of_ops), self._tests("rest", self._rest)]
        return [
            ("rates", "copy and matmul", [self._script("rates", "all", "rates.py")], 1, 0.5),
            ("warm", "all kernels compiled", [self._script("warm", "all", "warm.py", *warm)], 1, 1.0),
            ("smoke", "every op against the reference", smoke, 2 if self.cpu else len(smoke), 0.5),
            ("profile", "three unmasked steps", [self._script("profile", "all", "profile_step.py", *shape)], 1, 0.7),
            ("steps", "whole steps", [self._steps(shape) for shape in shapes], 1, 1.0),
            ("ops", "ops against public ones", [self._ops()], 1, 0.4),
            ("tune", "block sizes", [self._tune()], 1, 0.7),
            ("tests", "tests of the kernels", tests, 1, 1.0),
            ("train", "sgtm train, killed and resumed", [self._train()], 1, 1.0),
        ]

    def _script(self, stage: str, unit: str, script: str, *arguments: str) -> Unit:
        flags = ["--cpu"] if self.cpu else []
        command = [sys.executable, str(HERE / script), str(self.folder / f"{stage}.jsonl"), *flags, *arguments]
        return Unit(unit, lambda limit: command, f"{stage}.jsonl", environ=self.environ)

    def _shape(self) -> list[str]:
        return ["--shape", "tiny" if self.cpu else "254m"]

    def _steps(self, shape: str) -> Unit:
        """benchmarks/steps.py; half of the limit is for the measured rounds, the rest for start and warm-up."""
        rows = f"steps-{shape}.jsonl"

        def command(limit: float) -> list[str]:
            measuring = ["--rounds", "3" if self.cpu else "10", "--seconds", f"{limit / 2:.0f}"]
            options = ["--device", "cpu", "--backend", "torch"] if self.cpu else []
            script = [sys.executable, str(BENCHMARKS / "steps.py"), "--shape", shape]
            return [*script, "--json", str(self.folder / rows), *measuring, *options]

        return Unit(shape, command, rows, weight=1.3 if shape == "254m" else 1.0)

    def _ops(self) -> Unit:
        def command(limit: float) -> list[str]:
            each = limit / 2 / sum(op in self.ops for op in VARIANTS.values())  # the other half is compilation
            measuring = ["--rounds", "3" if self.cpu else "20", "--seconds", f"{each:.1f}", "--mask", ",".join(MASKS)]
            options = ["--device", "cpu", "--backend", "torch"] if self.cpu else []
            script = [sys.executable, str(BENCHMARKS / "ops.py"), "--only", ",".join(self.ops), *self._shape()]
            return [*script, "--json", str(self.folder / "ops.jsonl"), *measuring, *options]

        return Unit("all", command, "ops.jsonl")

    def _tune(self) -> Unit:
        options = ["--table", str(self.folder / "tuned.json")]
        options += ["--only", "mlp", *self._shape(), "--seconds", "0.1"] if self.cpu else ["--only", ",".join(self.ops)]
        return self._script("tune", "all", "tuning_table.py", *options)

    def _train(self) -> Unit:
        return self._script("train", "all", "train_runs.py", "--folder", str(self.folder / "train"))

    def _of_ops(self) -> list[Path]:
        files = [file for op in self.ops for file in sorted(TESTS.glob(f"test_{op}*.py"))]
        return [] if self.cpu else files

    def _rest(self) -> list[Path]:
        if self.cpu:
            return [TESTS / name for name in ON_A_CPU if (TESTS / name).exists()]
        left_out = {TESTS / name for name in NOT_ON_A_GPU} | set(self._of_ops())
        every = len(self.ops) == len(OPS)
        return [file for file in sorted(TESTS.glob("test_*.py")) if file not in left_out and every]

    def _tests(self, unit: str, files: Callable[[], list[Path]]) -> Unit:
        rows = self.folder / "tests.jsonl"

        def command(limit: float) -> list[str]:
            finished = Items(Journal(rows)).finished
            return test_command(
                [file for file in files() if file.name not in finished], rows, 2 if self.cpu else WORKERS
            )

        return Unit(unit, command, "tests.jsonl", weight=2.0 if unit == "ops" else 1.0, environ=self.environ)


def test_command(files: list[Path], rows: Path, workers: int = WORKERS) -> list[str]:
    """pytest without the plugins that pyproject.toml has options for, in `workers` processes where xdist is installed.

    Tests are scheduled in file order, so that a file is nearly finished before the next one begins.
    """
    if not files:
        return [sys.executable, "-c", ""]
    options = ["-o", "addopts=--import-mode=importlib -ra", "-p", "no:cacheprovider", "-q", "--tb=short"]
    options += ["-p", "gpu_stages.pytest_rows", "--rows", str(rows)]
    if find_spec("xdist"):
        options += ["-n", str(workers), "--dist", "load", "--maxschedchunk", "2"]
    return [sys.executable, "-m", "pytest", *options, *map(str, files)]
