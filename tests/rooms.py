"""The rooms of the code, lowest first: a room imports from those above it in this list, never from those below.

    python tests/rooms.py

prints every room with its files, its lines and the rooms it imports, and exits 1 where an import goes upward.
tests/unit/test_rooms.py runs it. Imports inside functions count; those for type checkers alone do not, nor do names
that are imported by a string: those of `sgtm/__init__.py`, and the module that a sweep starts.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = {
    "sgtm": "the version, and names for scripts",
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
    "sgtm.training": "the step and the loop",
    "sgtm.measure": "bench, profile, doctor",
    "sgtm.report": "the page of a run, beside others",
    "sgtm.estimate": "memory, traffic and speed from a config; launch commands",
    "sgtm.sweep": "many runs, one table",
    "sgtm.commands": "the command line",
    "sgtm.__main__": "the entry point",
}


def main() -> int:
    order = list(ROOMS)
    imports, files, lines = defaultdict(set), defaultdict(int), defaultdict(int)
    upward = []
    for path in sources():
        room = room_of(module_of(path))
        files[room] += 1
        lines[room] += len(path.read_text("utf-8").splitlines())
        for module in imported(path):
            other = room_of(module)
            if other != room:
                imports[room].add(other)
                if order.index(other) > order.index(room):
                    upward.append(f"{path.relative_to(ROOT)} imports {module}: {room} is below {other}")
    for room, about in ROOMS.items():
        print(f"{room:18}{files[room]:4} files {lines[room]:6} lines  {about}")
        print(f"{'':18}imports {', '.join(r for r in order if r in imports[room]) or 'nothing'}")
    print(*upward, sep="\n", end="\n" if upward else "")
    return int(bool(upward))


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
    holding = [room for room in ROOMS if room != "sgtm" and f"{module}.".startswith(f"{room}.")]
    if not holding:
        raise ValueError(f"{module} is in no room; give it one in {Path(__file__).name}, or move it")
    return holding[0]


def imported(path: Path) -> Iterator[str]:
    """Our modules that a file imports when it runs."""
    tree = ast.parse(path.read_text("utf-8"))
    for_checkers = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if node in for_checkers:
            continue
        if isinstance(node, ast.ImportFrom):
            modules = [f"sgtm.{name.name}" for name in node.names] if node.module == "sgtm" else [node.module]
        elif isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        else:
            continue
        yield from (module for module in modules if module.split(".")[0] in ("sgtm", "sgtm_kernels"))


if __name__ == "__main__":
    sys.exit(main())
