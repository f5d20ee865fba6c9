"""The rooms of the code, lowest first: a room imports from those above it in this list, never from those below.

    python tests/rooms.py

prints every room with its files, its lines and the rooms it imports, and exits 1 where an import breaks a rule:

- it goes upward, also inside a function or as `import_module("sgtm....")`
- it is relative, or of the package `sgtm` itself, whose names reach every room; `sgtm.__version__` is free
- it is of `sgtm` and in `sgtm_kernels`
- it closes a ring of files

Imports for type checkers alone do not count, nor do names that are no literal at the import: those of
`sgtm/__init__.py`, the backends and variants of an op, and the module that a sweep starts. An op's `variants.py` is in
the room of the tools: no other file of the op imports the tools, and training imports neither.
tests/unit/test_rooms.py runs all of this.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("sgtm", "sgtm_kernels")
IMPORTERS = ("import_module", "importlib.import_module", "__import__")
ROOMS = {
    "sgtm": "the version, and names for scripts",
    "sgtm_kernels.triton_common": "what the Triton kernels share",
    "sgtm_kernels": "masked ops, each with a reference, a PyTorch and a Triton implementation",
    "sgtm.files": "atomic writes",
    "sgtm.words": "numbers and lists in sentences",
    "sgtm.process": "rank, cores, signals of this process",
    "sgtm.masking": "labels, groups, strategies, channel, certificate: the method",
    "sgtm.config": "presets and YAML to a checked config",
    "sgtm.data": "prepare, corpus, packing, loader",
    "sgtm.model": "the transformer and its row layout",
    "sgtm.distributed": "DeepSpeed behind one engine; the optimizer",
    "sgtm.evaluation": "losses by category and removed set",
    "sgtm.run": "a run on disk: directory, checkpoints, metrics, evaluation",
    "sgtm.hf": "Hugging Face models, both ways",
    "sgtm.audit": "an exported folder held against its run",
    "sgtm.inference": "completions and token losses of runs and exported folders",
    "sgtm.integrations": "masks in models and trainers of Hugging Face and torchtitan",
    "sgtm.unlearning": "baselines from a run's model: post-hoc unlearning, adapters",
    "sgtm.training": "the step and the loop",
    "sgtm_kernels.tools": "ahead-of-time suite, tuning, timing; each op's variants.py",
    "sgtm.measure": "bench, profile, doctor",
    "sgtm.report": "the page of a run, beside others",
    "sgtm.demo": "a local page with a run's domains to switch off",
    "sgtm.estimate": "memory, traffic and speed from a config; launch commands",
    "sgtm.sweep": "many runs, one table",
    "sgtm.commands": "the command line",
    "sgtm.__main__": "the entry point",
}


def main() -> int:
    order = list(ROOMS)
    rooms, files, lines = defaultdict(set), defaultdict(int), defaultdict(int)
    problems = []
    for path in sources():
        room = room_of(module_of(path))
        files[room] += 1
        lines[room] += len(path.read_text("utf-8").splitlines())
        for line, module in imports(path):
            if problem := problem_of(room, module):
                problems.append(f"{path.relative_to(ROOT)}:{line} imports {module}: {problem}")
            else:
                rooms[room].add(room_of(module))
    problems += [f"ring of imports: {ring}" for ring in ring_of_files()]
    for room, about in ROOMS.items():
        print(f"{room:27}{files[room]:4} files {lines[room]:6} lines  {about}")
        print(f"{'':27}imports {', '.join(r for r in order if r in rooms[room] and r != room) or 'nothing'}")
    print(*problems, sep="\n", end="\n" if problems else "")
    return int(bool(problems))


def problem_of(room: str, module: str) -> str | None:
    """Why a file of this room must not import the module; None where it may."""
    if module.startswith("."):
        return "write the module's full name"
    if module == "sgtm":
        return "its names reach every room; import what is used from its own module"
    try:
        other = room_of(module)
    except ValueError as error:
        return str(error)
    if room.startswith("sgtm_kernels") and not other.startswith("sgtm_kernels"):
        return "the kernels import nothing of sgtm"
    order = list(ROOMS)
    return f"{room} is below {other}" if order.index(other) > order.index(room) else None


def ring_of_files() -> list[str]:
    """The first ring that is found, as file -> file -> ..., or nothing.

    A file depends on what it imports, and on the packages above that, which Python runs first, but for its own.
    """
    files = {module_of(path): path for path in sources()}
    graph = {}
    for module, path in files.items():
        graph[module] = set()
        for _, name in imports(path):
            target = next((prefix for prefix in _prefixes(name) if prefix in files), None)
            packages = [p for p in _prefixes(target or "") if p in files and not f"{module}.".startswith(f"{p}.")]
            graph[module].update(packages, {target} - {None, module})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(reversed(error.args[1]))]
    return []


def _prefixes(name: str) -> list[str]:
    """`a.b.c`, `a.b`, `a`."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def sources() -> list[Path]:
    return sorted([*(ROOT / "sgtm").rglob("*.py"), *(ROOT / "kernels" / "sgtm_kernels").rglob("*.py")])


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The most specific room that holds the module. Raises ValueError for a folder or file that is in no room."""
    if module in ("sgtm", "sgtm.__version__"):
        return "sgtm"
    parts = module.split(".")
    if parts[0] == "sgtm_kernels" and parts[2:3] == ["variants"]:
        return "sgtm_kernels.tools"
    holding = [room for room in ROOMS if room != "sgtm" and f"{module}.".startswith(f"{room}.")]
    if not holding:
        raise ValueError(f"{module} is in no room; give it one in {Path(__file__).name}, or move it")
    return max(holding, key=len)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of what a file imports of ours when it runs; a relative import begins with a dot."""
    tree = ast.parse(path.read_text("utf-8"))
    for_checkers = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in for_checkers:
            continue
        match node:
            case ast.ImportFrom(level=level) if level:
                modules = ["." * level + (node.module or "")]
            case ast.ImportFrom():
                modules = [f"{node.module}.{name.name}" for name in node.names]
            case ast.Import():
                modules = [name.name for name in node.names]
            case ast.Call(args=[ast.Constant(value=str(name)), *_]) if ast.unparse(node.func) in IMPORTERS:
                modules = [name]
            case _:
                continue
        for module in modules:
            if module.startswith(".") or module.split(".")[0] in PACKAGES:
                yield node.lineno, module


if __name__ == "__main__":
    sys.exit(main())
