"""Check that a backend computes the same as the reference on this device, before a run's first step.

`record_op_calls` keeps every call of an op that a small forward pass makes on the reference; `check` repeats each call
on the backend under test, forward and (but under `torch.no_grad`) backward, in memory poisoned with NaN where possible,
and compares:

- outputs and gradients have the reference's shape and dtype, and are finite;
- rows that are zero in the reference (inactive, or masked), and entries of vectors, are exactly 0;
- the largest error is at most `FACTOR` times that of the reference in the same dtype, both against the reference in a
  wider one, plus `FLOOR` roundings of the largest value.

So every kernel is checked as the run launches it: with its widths, groups, masks, windows and documents. AdamW, which
a forward pass does not call, is checked on slices of its own. `tests/kernels/test_selfcheck.py` breaks kernels on
purpose.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TypeGuard

import torch

from sgtm_kernels.accuracy import compare
from sgtm_kernels.adamw import Tensors, WeightSlice, prepare
from sgtm_kernels.dispatch import ALGORITHMS, OPS, algorithm, pick, replaced
from sgtm_kernels.measurement import cpu_model, driver, installed
from sgtm_kernels.plan import MaskPlan
from sgtm_kernels.testing import poisoned_memory, random_like
from sgtm_kernels.triton_common.tuning import table_of

PACKAGE = Path(__file__).parent
FACTOR, FLOOR = 4.0, 4.0


class Call(NamedTuple):
    """One call of an op's function in a backend's module; learns: whether gradients are wanted, as in training."""

    op: str
    function: str
    arguments: tuple
    options: dict
    learns: bool

    @property
    def signature(self) -> str:
        """What decides which kernels it launches, as text; the values of tensors do not."""
        described = [_describe(a) for a in (*self.arguments, *self.options.items())]
        return repr((self.op, self.function, described, self.learns))


@contextmanager
def record_op_calls() -> Iterator[list[Call]]:
    """The calls of all ops that the backend `reference` serves inside, in order; of equal signatures the first."""
    calls: dict[str, Call] = {}

    class Recorder(ModuleType):
        def __init__(self, op: str):
            super().__init__(f"recorder of {op}")
            self.op, self.module = op, pick(op, "reference")

        def __getattr__(self, function: str):
            def record(*arguments, **options):
                copies = tuple(_detached(a) for a in arguments)
                call = Call(self.op, function, copies, options, torch.is_grad_enabled())
                calls.setdefault(call.signature, call)
                return getattr(self.module, function)(*arguments, **options)

            return record

    recording: list[Call] = []
    with replaced({(op, "reference"): Recorder(op) for op in OPS}):
        yield recording
    recording += calls.values()


def check(calls: Sequence[Call], backend: str, device: torch.device) -> dict[str, str | None]:
    """By op, what is wrong with it in this backend, or None.

    Raises RuntimeError if a kernel has broken the CUDA context: nothing can run in this process afterwards.
    """
    problems: dict[str, str | None] = {}
    checks: list[tuple[str, str, Callable[[], None]]] = [
        (call.op, call.function, partial(_check_call, call, backend)) for call in calls
    ]
    checks.append(("adamw", "adamw", lambda: _check_adamw(backend, device)))
    for op, function, action in checks:
        if problems.get(op) is None:
            problems[op] = _problem(f"{op}.{function}", action, device)
    return problems


def _problem(name: str, action: Callable[[], None], device: torch.device) -> str | None:
    try:
        action()
    except Exception as error:  # a compiler or a launch can raise anything
        problem = f"{name}: {error}" if isinstance(error, Wrong) else f"{name}: {type(error).__name__}: {error}"
        if device.type == "cuda":
            try:
                torch.cuda.synchronize(device)
            except RuntimeError as broken:
                raise RuntimeError(f"the kernels of {problem}; the CUDA context is lost ({broken})") from error
        return problem
    return None


class Wrong(Exception):
    """A result that is not the reference's."""


def _check_call(call: Call, backend: str) -> None:
    # First, so that memory it does not write cannot hold the reference's results.
    with _poisoned(call.arguments):
        ours = _results(call, backend)
    plain = _results(call, "reference")
    dtype = max((t.dtype for t in call.arguments if _floating(t)), key=lambda d: d.itemsize)
    exact = _results(call, "reference", torch.float64 if dtype == torch.float32 else torch.float32)
    for name, value in ours.items():
        _compare(name, value, plain[name], exact[name])


def _results(call: Call, backend: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Outputs, and the gradients of floating arguments that need one under random gradients of the outputs."""

    def leaf(value):
        if isinstance(value, tuple):
            return tuple(leaf(v) for v in value)
        if not _floating(value):
            return value
        return value.detach().to(dtype or value.dtype, copy=True).requires_grad_(value.requires_grad)

    arguments = [leaf(a) if isinstance(a, (tuple, torch.Tensor)) else a for a in call.arguments]
    with torch.set_grad_enabled(call.learns):
        outputs = getattr(pick(call.op, backend), call.function)(*arguments, **call.options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {i}": out.detach().clone() for i, out in enumerate(outputs)}
    learned = {f"gradient of argument {i}": a for i, a in enumerate(arguments) if _floating(a) and a.requires_grad}
    differentiable = [(out, random_like(out, i)) for i, out in enumerate(outputs) if out.requires_grad]
    if learned and differentiable:
        outputs, upstream = zip(*differentiable, strict=True)
        gradients = torch.autograd.grad(outputs, list(learned.values()), upstream, allow_unused=True)
        for (name, argument), gradient in zip(learned.items(), gradients, strict=True):
            results[name] = torch.zeros_like(argument) if gradient is None else gradient
    return results


def _compare(name: str, ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Raises Wrong."""
    if (ours.shape, ours.dtype) != (plain.shape, plain.dtype):
        raise Wrong(f"{name} is {ours.dtype} {tuple(ours.shape)}, not {plain.dtype} {tuple(plain.shape)}")
    if not ours.numel():
        return
    if not bool(ours.isfinite().all()):
        raise Wrong(f"{name} is not finite")
    comparison = compare(ours, plain, exact, FACTOR, FLOOR)
    if comparison.rows_not_zero:
        raise Wrong(f"{name} is not 0 where it is masked")
    if not comparison.ok:
        raise Wrong(f"{name} is off by {comparison.error:.2e}, where {comparison.budget:.2e} is allowed")


def _check_adamw(backend: str, device: torch.device) -> None:
    """Two clipped updates of slices that begin and end anywhere; what lies between them stays."""
    slices = [WeightSlice(0, 3, 5, 0, 0.1), WeightSlice(0, 8, 2068, 1, 0.1), WeightSlice(0, 2069, 3000, 0, 0.0)]

    def updated(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        like = torch.empty(3001, dtype=torch.float32, device=device)
        weight, grad, first, second = (random_like(like, seed).to(dtype) for seed in range(4))
        step = prepare(slices, (0.9, 0.95), 1e-8, name)
        for count in (1, 2):  # a backend may clip the gradient in place
            step([Tensors(weight, grad.clone(), first, second.abs_())], [count, count + 5], 1e-2, 0.5)
        return {"weight": weight, "exp_avg": first, "exp_avg_sq": second}

    with poisoned_memory() if _may_poison(device) else nullcontext():
        ours = updated(backend, torch.float32)
    plain, exact = updated("reference", torch.float32), updated("reference", torch.float64)
    between = torch.ones(3001, dtype=torch.bool, device=device)
    for piece in slices:
        between[piece.start : piece.end] = False
    for name, value in ours.items():
        if bool((value[between] != plain[name][between]).any()):
            raise Wrong(f"{name} of elements that are not updated has changed")
        _compare(name, value, plain[name], exact[name])


def _poisoned(arguments: tuple):
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    return poisoned_memory() if _may_poison(device) else nullcontext()


def _may_poison(device: torch.device) -> bool:
    """Poisoning needs strict determinism, which cuBLAS supports only if it was set when the process started."""
    return device.type != "cuda" or torch.are_deterministic_algorithms_enabled()


def _floating(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _detached(value: object) -> object:
    return value.detach().clone().requires_grad_(value.requires_grad) if _floating(value) else value


def _describe(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.requires_grad
    if isinstance(value, MaskPlan):
        return _describe(value.tables), value.label_runs, value.batch, value.seq_len, value.documents
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, astuple(value)
    return tuple(map(_describe, value)) if isinstance(value, tuple) else value


class Passed:
    """Cache of passed checks, by device, driver, torch, Triton and code, one file each; failures are not cached.

    folder  of the files; one that cannot be read or written counts as missing
    """

    def __init__(self, folder: Path, calls: Sequence[Call], backend: str, device: torch.device):
        self.facts = facts(device) | {"backend": backend}
        text = json.dumps([self.facts, sorted(call.signature for call in calls)])
        self.path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def __bool__(self) -> bool:
        try:
            return json.loads(self.path.read_text("utf-8")) == self.facts
        except (OSError, ValueError):
            return False

    def keep(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(f".{secrets.token_hex(8)}")
            part.write_text(json.dumps(self.facts), "utf-8")
            part.replace(self.path)
        except OSError:
            pass


def facts(device: torch.device) -> dict[str, str | None]:
    """What a verdict depends on besides the calls."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "driver": driver() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "code": _code(),
        "tuned": _tuned(device),
        **{variable: algorithm(variable) for variable in ALGORITHMS},
    }


def _tuned(device: torch.device) -> str | None:
    """Hash of the table of kernel configurations in force; None where heuristics hold."""
    table = table_of(device)
    return None if table is None else hashlib.sha256(table.path.read_bytes()).hexdigest()


@cache
def _code() -> str:
    """Hash of this package's files."""
    files = sorted(PACKAGE.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
