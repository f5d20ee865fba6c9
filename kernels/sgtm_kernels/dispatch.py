"""Which backend runs an op.

Every op is a folder with one module per backend; all backends of an op have the same functions. `reference` is plain
PyTorch through autograd, the oracle of the tests; `runs` works on row and token slices. A backend named explicitly,
in a config or in the environment variable SGTM_KERNELS, never falls back to another.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from types import ModuleType

OPS = ("linear", "mlp", "attention", "norm", "embedding", "cross_entropy", "adamw")
BACKENDS = ("reference", "runs")
DEFAULT = "runs"


def resolve(name: str = "auto") -> str:
    """Backend that `name` stands for: `auto` follows SGTM_KERNELS, else is `runs`.

    Raises ValueError for an unknown backend, and where `name` and SGTM_KERNELS both name one and differ.
    """
    wanted = os.environ.get("SGTM_KERNELS") or "auto"
    for source, value in (("backend", name), ("SGTM_KERNELS", wanted)):
        if value not in ("auto", *BACKENDS):
            raise ValueError(f"{source}: unknown kernel backend {value!r}; known: auto, {', '.join(BACKENDS)}")
    if "auto" not in (name, wanted) and name != wanted:
        raise ValueError(f"the config asks for kernel backend {name!r} but SGTM_KERNELS={wanted!r}; set one of them")
    named = [value for value in (name, wanted) if value != "auto"]
    return named[0] if named else DEFAULT


@cache
def pick(op: str, backend: str) -> ModuleType:
    """The module of one op in one (resolved) backend."""
    if op not in OPS or backend not in BACKENDS:
        raise ValueError(f"no backend {backend!r} of op {op!r}; ops: {', '.join(OPS)}; backends: {', '.join(BACKENDS)}")
    return import_module(f"sgtm_kernels.{op}.{backend}")
