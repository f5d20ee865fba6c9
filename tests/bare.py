"""A process as it would run on a machine that has torch, Triton, transformers, numpy and pytest, and little else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUARDS = Path(__file__).parent / "guards"
ABSENT = (
    "deepspeed", "pydantic", "rich", "yaml", "datasets", "pyarrow", "wandb", "matplotlib", "jinja2", "psutil",
    "hypothesis", "pytest_timeout", "xdist", "zstandard", "sgtm",
)  # fmt: skip
BLOCK = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {absent} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
import sdpa_guard  # this file takes the place of tests/guards/sitecustomize.py
"""


def environment_without(absent: Collection[str], folder: Path) -> dict[str, str]:
    """Environment in which these packages are not found, nor any plugin of pytest; `folder` is written to."""
    (folder / "sitecustomize.py").write_text(BLOCK.format(absent=tuple(absent)))
    path = {"PYTHONPATH": python_path(folder, ROOT / "kernels", os.environ.get("PYTHONPATH", ""))}
    return os.environ | path | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def python_path(*entries: Path | str) -> str:
    """A PYTHONPATH of these entries, and of the guards of all tests (conftest.py)."""
    return os.pathsep.join(filter(None, map(str, (*entries, GUARDS))))


def execute(command: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
