"""What tests of masked ops share: random masks of every shape, memory poisoned with NaN, an error budget.

Ships with the package, so that whoever adds a backend or runs on a new device can hold it against the reference.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeGuard

import torch

from sgtm_kernels.accuracy import compare
from sgtm_kernels.dispatch import BACKENDS
from sgtm_kernels.plan import JOINT_KINDS, MAX_SLICES, PROJECTIONS, MaskPlan, Tables, merge_label_runs

BINARY = (0.0, 1.0)
FLOATS = (0.0, 1.0, 0.5, -1.0, 2.0)

# How labels lie in a micro-batch: one label; sequences sorted by label; sequences in any order (9 and above: more runs
# than MAX_SLICES); a few runs that begin and end inside sequences; more such runs than MAX_SLICES.
LAYOUTS = ("uniform", "sorted", "unsorted", "ragged", "tokens")


EXACT = ("reference", "torch")  # backends that run in fp64
FAST = ("torch", "triton")


def backends_and_dtypes(backends: Sequence[str] = BACKENDS) -> list[tuple[str, torch.dtype]]:
    """Every backend in fp32 and in the half precision that it is tested in."""
    return [(backend, dtype) for backend in backends for dtype in (torch.float32, low_precision(backend))]


def low_precision(backend: str) -> torch.dtype:
    """Half precision that a backend is tested in: bf16, but fp16 in Triton's interpreter, which is wrong in bf16."""
    return torch.float16 if backend == "triton" and not torch.cuda.is_available() else torch.bfloat16


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory (torch.empty and its kin) is NaN, or the largest integer: a row left unwritten shows."""
    deterministic: Any = torch.utils.deterministic  # a class of module with this property, which mypy does not see
    before = torch.get_deterministic_debug_mode()
    filled, deterministic.fill_uninitialized_memory = deterministic.fill_uninitialized_memory, True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        deterministic.fill_uninitialized_memory = filled


def random_tables(seed: int, values: Sequence[float] = FLOATS, labels: int = 4, groups: int = 3) -> Tables:
    """Tables with entries drawn from `values`; `values=(1.0,)` masks nothing.

    The first group is active under the first label, so that no op is left without any work.
    """
    rng = random.Random(seed)

    def grid():
        return tuple(tuple(rng.choice(values) for _ in range(groups)) for _ in range(labels))

    active = [list(row) for row in grid()]
    active[0][0] = 1.0
    return Tables(
        tuple(f"label{i}" for i in range(labels)),
        tuple(f"group{i}" for i in range(groups)),
        tuple(tuple(row) for row in active),
        grid(),
        {projection: grid() for projection in PROJECTIONS},
        {kind: tuple(rng.choice(values) for _ in range(labels)) for kind in JOINT_KINDS},
    )


def random_plan(seed: int, tables: Tables, layout: str, batch: int, seq_len: int, documents: bool = False) -> MaskPlan:
    """Labels in one of `LAYOUTS`, every label among them where there is room.

    documents  whether the pieces between the cuts below do not attend to one another: they are label-pure, and where a
               label holds for a whole sequence it is cut into documents all the same
    """
    rng = random.Random(seed)
    names = range(len(tables.labels))
    if layout in ("uniform", "sorted", "unsorted"):
        labels = [rng.choice(names)] * batch if layout == "uniform" else _every(rng, names, batch)
        labels = sorted(labels) if layout == "sorted" else labels
        edges = list(range(0, (batch + 1) * seq_len, seq_len))
    else:
        tokens = batch * seq_len
        pieces = MAX_SLICES - 2 if layout == "ragged" else 6 * MAX_SLICES
        cuts = rng.sample(range(1, tokens), min(pieces, tokens) - 1) if tokens > 1 else []
        edges = [0, *sorted(cuts), tokens]
        labels = _every(rng, names, len(edges) - 1)
    lengths = [end - start for start, end in pairwise(edges)]
    cut = None
    if documents:
        inside = {start + rng.randrange(seq_len) for start in range(0, batch * seq_len, seq_len)}
        borders = sorted({*edges, *range(0, batch * seq_len, seq_len), *inside})
        cut = tuple(pairwise(borders))
    return MaskPlan(tables, merge_label_runs(labels, lengths), batch, seq_len, cut)


def _every(rng: random.Random, labels: Sequence[int], count: int) -> list[int]:
    """`count` labels in random order, each at least once if they fit, neighbours mostly different."""
    drawn = rng.sample(labels, min(count, len(labels)))
    while len(drawn) < count:
        drawn.append(rng.choice([label for label in labels if label != drawn[-1]] or labels))
    return drawn


def forward_backward(
    function: Callable[..., torch.Tensor], *inputs: torch.Tensor | None, seed: int = 0
) -> list[torch.Tensor | None]:
    """Output of `function(*inputs)` and, for a random output gradient, the gradient of every floating input.

    Runs in poisoned memory. The output gradient is the same for every dtype, but for rounding. None where an input is
    None or of integers.
    """
    leaves = [x.detach().clone().requires_grad_() if _floating(x) else x for x in inputs]
    with poisoned_memory():
        out = function(*leaves)
        out.backward(random_like(out, seed))
    return [out.detach(), *(x.grad if _floating(x) else None for x in leaves)]


def _floating(x: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    return x is not None and x.is_floating_point()


def random_like(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Standard normal values, the same for every dtype but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)


def assert_accurate(
    actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, name: str = "result", factor: float = 2.0
) -> None:
    """The largest error of `actual` is within the budget of `compare`; masked rows have an assertion of their own."""
    assert actual.shape == exact.shape and actual.dtype == plain.dtype, f"{name}: {actual.shape} {actual.dtype}"
    comparison = compare(actual, plain, exact, factor)
    assert comparison.error <= comparison.budget, (
        f"{name}: error {comparison.error:.3e}, budget {comparison.budget:.3e}"
    )


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, name: str = "result") -> None:
    """Equal in every bit but the sign of a zero, NaN nowhere."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, f"{name}: {actual.dtype} {actual.shape}"
    differing = int((actual != expected).sum())  # a NaN differs from itself
    assert differing == 0, f"{name}: {differing} of {actual.numel()} entries differ"


def token_mask(plan: MaskPlan, labels: Sequence[int]) -> torch.Tensor:
    """bool [B, S]: the tokens of these labels."""
    mask = torch.zeros(plan.tokens, dtype=torch.bool)
    for label, start, end in plan.label_runs:
        mask[start:end] = label in labels
    return mask.view(plan.batch, plan.seq_len)
