"""Which backend runs an op.

Every op is a folder with one module per backend; all backends of an op have the same functions. `reference` is plain
PyTorch through autograd, the oracle of the tests; `torch` works on row and token slices; `triton` fuses the masks into
kernels. `auto` is `triton` on a CUDA device, else `torch`; an op whose kernels fail the self-check (selfcheck.py) is
then served by `torch`. A backend that is named, in a config or in the environment variable SGTM_KERNELS, never falls
back to another: where Triton is missing, or there is neither a CUDA device nor its interpreter, naming `triton` is an
error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from sgtm_kernels import current_name
from sgtm_kernels.autograd import captured

OPS = ("linear", "mlp", "attention", "norm", "embedding", "cross_entropy", "adamw")
BACKENDS = ("reference", "torch", "triton")
# Environment variables that choose inside a backend, and what they may name.
ALGORITHMS = {"SGTM_ATTENTION": ("sdpa", "flash_attn", "flex"), "SGTM_LINEAR": ("masked", "rectangles")}
FALLBACK = "torch"  # runs everywhere
# Ops of a transformer block, which `torch.compile` captures: in a graph `torch` has a module of its own for them.
CAPTURED = ("linear", "mlp", "attention", "norm")
_MODULES = {"torch": "pytorch", "triton": "kernel"}  # of an op's folder, where it is not the backend's name
_LOADED: dict[tuple[str, str], ModuleType] = {}
_FALLEN: set[tuple[str, str]] = set()  # ops and backends that FALLBACK serves


def resolve(name: str = "auto", dtype: torch.dtype | None = None, device: str | None = None) -> str:
    """Backend that `name` stands for.

    `auto` follows SGTM_KERNELS, else is `triton` on CUDA where it runs, else `torch`.

    device  type of the device of the tensors; None: `cuda` where there is one
    Raises ValueError for an unknown backend, for one that cannot run here (or not in `dtype`), and where `name` and
    SGTM_KERNELS both name one and differ.
    """
    return explain(name, dtype, device)[0]


def explain(name: str = "auto", dtype: torch.dtype | None = None, device: str | None = None) -> tuple[str, str]:
    """What `resolve` returns, and why."""
    name, wanted = current_name(name), current_name(os.environ.get("SGTM_KERNELS") or "auto")
    for source, value in (("the kernel backend", name), ("SGTM_KERNELS", wanted)):
        if value not in ("auto", *BACKENDS):
            raise ValueError(f"{source} is {value!r}; it takes {_either('auto', *BACKENDS)}")
    if "auto" not in (name, wanted) and name != wanted:
        raise ValueError(f"the config has kernel backend {name!r}, but SGTM_KERNELS is {wanted!r}; set one of them")
    for source, value in (("the config", name), ("SGTM_KERNELS", wanted)):
        if value != "auto":
            if problem := unusable(value, dtype):
                raise ValueError(f"kernel backend {value!r} was requested, but {problem}")
            return value, f"named by {source}"
    if (device or ("cuda" if torch.cuda.is_available() else "cpu")) != "cuda":
        return FALLBACK, "the default on a CPU"
    problem = "Triton is interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else unusable("triton", dtype)
    return (FALLBACK, f"the default where {problem}") if problem else ("triton", "the default on CUDA")


def named(name: str = "auto") -> bool:
    """Whether the config (`name`) or SGTM_KERNELS names a backend, which then never falls back."""
    return name != "auto" or os.environ.get("SGTM_KERNELS") not in (None, "", "auto")


def algorithm(variable: str) -> str | None:
    """What one of ALGORITHMS names in the environment, or None. Raises ValueError for what is not known."""
    chosen = os.environ.get(variable) or None
    if chosen not in (None, *ALGORITHMS[variable]):
        raise ValueError(f"{variable} is {chosen!r}; it takes {_either(*ALGORITHMS[variable])}")
    return chosen


def _either(*values: str) -> str:
    return f"{', '.join(values[:-1])} or {values[-1]}"


def unusable(backend: str, dtype: torch.dtype | None = None) -> str | None:
    """Why this backend cannot run here (or not in `dtype`), or None."""
    if backend != "triton":
        return None
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter gives wrong results in bf16; use fp32" if dtype == torch.bfloat16 else None
    if not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs it, slowly and in fp32, in Triton's interpreter)"
    return None


def pick(op: str, backend: str) -> ModuleType:
    """The module of one op in one (resolved) backend; inside a graph of `torch.compile` the one that it captures."""
    if (op, backend) in _FALLEN:
        backend = FALLBACK
    if backend == FALLBACK and op in CAPTURED and captured():
        return _LOADED[op, "compiled"]
    if (op, backend) not in _LOADED:
        backend = current_name(backend)
        if op not in OPS or backend not in BACKENDS:
            known = f"ops: {', '.join(OPS)}; backends: {', '.join(BACKENDS)}"
            raise ValueError(f"no backend {backend!r} of op {op!r}; {known}")
        _LOADED[op, backend] = import_module(module_name(op, backend))
    return _LOADED[op, backend]


def fall_back(op: str, backend: str) -> None:
    """From now on, in this process, `torch` serves this op where `backend` is picked."""
    pick(op, FALLBACK)
    _FALLEN.add((op, backend))


def served(backend: str) -> str:
    """The backend, and the ops that have fallen back: `triton`, or `triton (attention, norm by torch)`."""
    fallen = [op for op in OPS if (op, backend) in _FALLEN]
    return f"{backend} ({', '.join(fallen)} by {FALLBACK})" if fallen else backend


@contextmanager
def replaced(modules: dict[tuple[str, str], ModuleType]) -> Iterator[None]:
    """Inside, these serve the ops and backends that are their keys."""
    before, fallen = dict(_LOADED), set(_FALLEN)
    _LOADED.update(modules)
    try:
        yield
    finally:
        _LOADED.clear()
        _LOADED.update(before)
        _FALLEN.clear()
        _FALLEN.update(fallen)


def load(backend: str) -> None:
    """Import all ops of a backend now, which else happens at their first call: a function that is compiled cannot.

    Raises ValueError where an environment variable names an unknown algorithm, of this backend or another.
    """
    for variable in ALGORITHMS:
        algorithm(variable)
    for op in OPS:
        pick(op, backend)
    for op in CAPTURED:
        _LOADED[op, "compiled"] = import_module(module_name(op, "compiled"))


def module_name(op: str, backend: str) -> str:
    return f"sgtm_kernels.{op}.{_MODULES.get(backend, backend)}"
