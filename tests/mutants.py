"""Break the code on purpose, one fault at a time, and see a test fail.

    python tests/mutants.py [--only WORDS] [--jobs N]

Every file of tests/mutations lists faults of one room of `sgtm/`, one folder of the kernels, or one other folder:

    - fault: what is wrong, in a line
      file: of the source
      old: |      whole lines that occur in it once, at any indentation
      new: |      what they become
      test: the test that must fail, as pytest takes it; several with spaces between them
      survives: |      only where no test can fail: why

The tests run first on the code as it is. Each fault is then made in a copy of the tree, and its test run there; one
that still passes is a survivor. Prints every fault, then the survivors. Exits 1 if a survivor is not explained, or if a
fault that has `survives` is noticed. A test that does not end counts as failed. One whose process is ended by a signal,
which may be the machine's doing (out of memory), runs again: if that happens twice the fault is `crashed`, and counts
as killed; else the second result counts. `make quick` checks that every fault can be made. Processes are forked from
one that has imported torch, so that a fault costs little more than its test.
"""

from __future__ import annotations

import argparse
import compileall
import io
import os
import py_compile
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import deque
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PATHS = (".", "kernels", "benchmarks", "tests")
LIMIT = 300  # seconds for a test, which counts as failed then
PASSED, FAILED = 0, 1  # exit statuses of pytest
RESULTS = {PASSED: "survives", FAILED: "killed"}


@dataclass(frozen=True)
class Mutant:
    fault: str
    file: str
    old: str
    new: str
    test: str
    survives: str = ""

    @property
    def tests(self) -> list[str]:
        return self.test.split()

    def applied(self, text: str) -> str:
        """The source with the fault. Raises ValueError where `old` does not occur once, or `new` is no change."""
        matches = []
        for indent in range(0, 41, 4):
            old, new = (textwrap.indent(part.rstrip("\n") + "\n", " " * indent) for part in (self.old, self.new))
            matches += [(i, old, new) for i in _starts(text, old)]
        if len(matches) != 1 or self.old == self.new:
            raise ValueError(f"{self.fault}: {len(matches)} places in {self.file} like\n{self.old}")
        ((start, old, new),) = matches
        return text[:start] + new + text[start + len(old) :]


@dataclass(frozen=True)
class Job:
    """Tests to run, with a fault or on the code as it is."""

    tests: list[str]
    mutant: Mutant | None = None


def _starts(text: str, lines: str) -> Iterator[int]:
    """Where whole lines begin."""
    start = text.find(lines)
    while start >= 0:
        if start == 0 or text[start - 1] == "\n":
            yield start
        start = text.find(lines, start + 1)


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings have each key once: of two entries that a merge made one, the first would be lost."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise ValueError(f"a key stands twice in {keys}: {node.start_mark}")
        return super().construct_mapping(node, deep)


def load() -> list[Mutant]:
    """All entries. Raises ValueError where a key of one stands twice."""
    files = sorted((ROOT / "tests" / "mutations").glob("*.yaml"))
    return [Mutant(**entry) for file in files for entry in yaml.load(file.read_text("utf-8"), _UniqueKeys)]


class Tree:
    """A copy of the tracked files, in which one fault at a time is made."""

    def __init__(self, folder: Path):
        self.folder = folder
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        for path in ROOT.glob(".venv/*/.installed"):  # packages of single tests, from the Makefile
            (folder / ".venv").mkdir(exist_ok=True)
            (folder / ".venv" / path.parent.name).symlink_to(path.parent)
        author = ("-c", "user.name=mutants", "-c", "user.email=mutants@localhost")
        for command in (("init",), ("add", "--all"), (*author, "commit", "--message=tree")):  # rows carry a commit
            subprocess.run(
                ["git", *command], cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        hashed = py_compile.PycInvalidationMode.CHECKED_HASH  # two faults of a file may lie within one second
        compileall.compile_dir(folder, quiet=2, invalidation_mode=hashed)
        self._original: tuple[Path, str] | None = None

    def make(self, mutant: Mutant) -> None:
        path = self.folder / mutant.file
        self._original = (path, path.read_text("utf-8"))
        path.write_text(mutant.applied(self._original[1]), "utf-8")

    def mend(self) -> None:
        if self._original:
            path, text = self._original
            path.write_text(text, "utf-8")

    def start(self, tests: list[str]) -> int:
        """The process id of pytest with these tests, a group of its own; its exit status is pytest's."""
        if pid := os.fork():
            return pid
        status = 70
        try:
            os.setpgid(0, 0)
            os.chdir(self.folder)
            paths = [str(self.folder / name) for name in PATHS]
            sys.path[:0] = paths
            sys.dont_write_bytecode = True
            environ = {
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "PYTHONDONTWRITEBYTECODE": "1",
                "OMP_NUM_THREADS": "1",
                "SGTM_TESTS_PATIENCE": "120",
            }
            os.environ.update(environ)
            import pytest

            with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
                alike = ["-p", "no:cacheprovider", "--hypothesis-seed=0"]  # a fault is killed in every run or in none
                status = int(pytest.main(["-x", "-q", *alike, f"--timeout={LIMIT}", *tests]))
            (self.folder / "output").write_text(out.getvalue(), "utf-8")
        finally:
            os._exit(status)


def run(jobs: list[Job], trees: list[Tree]) -> Iterator[tuple[int, int, float, str]]:
    """(index, exit status, seconds, output) of each job, as they end; -N where signal N has ended it twice."""
    waiting, free = deque(enumerate(jobs)), list(trees)
    running: dict[int, tuple[int, Tree, float]] = {}
    crashed: set[int] = set()
    while waiting or running:
        while waiting and free:
            index, job = waiting.popleft()
            tree = free.pop()
            if job.mutant:
                tree.make(job.mutant)
            running[tree.start(job.tests)] = index, tree, time.monotonic()
        pid, status = os.wait()
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what a test has left behind
        index, tree, begin = running.pop(pid)
        tree.mend()
        free.append(tree)
        output = tree.folder / "output"
        text = output.read_text("utf-8") if output.exists() else ""
        output.unlink(missing_ok=True)
        code = os.waitstatus_to_exitcode(status)
        if code < 0 and index not in crashed:
            crashed.add(index)
            waiting.append((index, jobs[index]))
        else:
            yield index, code, time.monotonic() - begin, text


def shards(mutants: list[Mutant], count: int) -> list[Job]:
    """All tests once, those of a file together."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    files = sorted({test.partition("::")[0] for test in tests})
    parts = [[t for t in tests if t.partition("::")[0] in files[i::count]] for i in range(count)]
    return [Job(part) for part in parts if part]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults with these words in their name, file or test")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="tests at a time (default: one a core)")
    options = parser.parse_args(arguments)
    mutants = [m for m in load() if options.only in f"{m.fault} {m.file} {m.test}"]
    import torch  # noqa: F401 (before the forks)
    import transformers  # noqa: F401

    survivors, wrong = [], []
    with tempfile.TemporaryDirectory(prefix="sgtm-mutants-") as folder:
        trees = [Tree(Path(folder, str(i))) for i in range(options.jobs)]
        for _, status, _, output in run(shards(mutants, options.jobs), trees):
            if status != PASSED:
                print(output[-4000:], "error: tests fail on the code as it is", sep="\n")
                return 1
        for index, status, seconds, output in run([Job(mutant.tests, mutant) for mutant in mutants], trees):
            mutant = mutants[index]
            result = "crashed" if status < 0 else RESULTS.get(status, f"status {status}")
            by = f" ({signal.Signals(-status).name})" if status < 0 else ""
            print(f"{result:9} {seconds:5.1f} s  {mutant.file}: {mutant.fault}{by}", flush=True)
            broken = status > 0 and status not in RESULTS
            if status == PASSED:
                survivors.append(mutant)
            if broken:
                print(output[-2000:])
            if (status == PASSED) != bool(mutant.survives) or broken:
                wrong.append(mutant)
    print(f"{len(mutants)} fault{'s' * (len(mutants) != 1)}, {len(survivors)} survive")
    for mutant in survivors:
        print(f"  {mutant.file}: {mutant.fault}\n    {mutant.survives.strip() or 'NOT EXPLAINED: ' + mutant.test}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
