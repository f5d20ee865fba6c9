"""What kernels are launched as, recorded from the functions that launch them, for the ahead-of-time suite (aot.py).

`variants()` of <op>/variants.py calls those functions under `record_launches`, which takes kernels, types and flags,
and adds what is expected of the machine code by `dataclasses.replace`. Training imports none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from triton.runtime.jit import JITFunction, KernelInterface

from sgtm_kernels.plan import JOINT_KINDS, PROJECTIONS, MaskPlan, Tables, merge_label_runs
from sgtm_kernels.triton_common.tuning import Choice, trial


@dataclass(frozen=True)
class KernelVariant:
    """One kernel in one configuration.

    As launched:

    kernel      the `@triton.jit` function
    signature   type of every argument that is not a constexpr: `*bf16`, `*fp32`, `i32`, `fp32`, ...
    constants   value of every constexpr
    unaligned   arguments that are not multiples of 16 (pointers: of 16 bytes); all others are compiled as such
    fp_fusion   whether a multiplication and an addition may become one instruction, with one rounding

    As expected of the machine code:

    tensor_cores      whether it must use them
    hgmma_columns     on sm_90, those of its tensor-core instructions (HGMMA), ascending; None: any
    widest_bits       bits of the widest access to global memory, at least
    min_wide_words    words of so many bits that instructions access; narrower accesses are no such words
    max_subwords      instructions that access 8 or 16 bits of global memory: single values, rows that begin anywhere
    max_below_widest  instructions that access words narrower than `widest_bits`; None: any number
    min_programs      that a multiprocessor of sm_90 holds at once, by their registers and shared memory
    spill             why registers may spill here; None: they may not
    spill_on          the architectures where they may
    first_arch        the oldest architecture that it is launched on
    """

    kernel: JITFunction
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    unaligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    fp_fusion: bool = True
    tensor_cores: bool = False
    hgmma_columns: tuple[int, ...] | None = None
    widest_bits: int = 128
    min_wide_words: int = 1
    max_subwords: int = 0
    max_below_widest: int | None = None
    min_programs: int = 1
    spill: str | None = None
    spill_on: tuple[int, ...] = (80, 90, 100)
    first_arch: int = 80

    @staticmethod
    def words(elements: int, dtype: torch.dtype, warps: int) -> int:
        """128-bit words that each thread of `warps` warps accesses to move this many elements."""
        return elements * dtype.itemsize // (16 * 32 * warps)

    @property
    def operands(self) -> str:
        """`half` if an operand is in half precision, else `fp32`."""
        specs = (*self.signature.values(), *map(str, self.constants.values()))
        return "half" if any(spec in ("*bf16", "*fp16", "bf16", "fp16") for spec in specs) else "fp32"

    @property
    def arches(self) -> tuple[int, ...]:
        """Architectures to compile for; only sm_90 if no operand is in half precision: no GPU is meant to train so."""
        arches = (80, 90, 100) if self.operands == "half" else (90,)
        return tuple(arch for arch in arches if arch >= self.first_arch)

    @property
    def name(self) -> str:
        values = " ".join(f"{k}={v}" for k, v in self.constants.items())
        dtypes = "/".join(sorted({t[1:] for t in self.signature.values() if t.startswith("*")}))
        return f"{self.kernel.__name__} {dtypes} {values} warps={self.num_warps} stages={self.num_stages}"


def record_launches(
    call: Callable[..., object], *args: object, forced: dict[Choice, Any] | None = None
) -> list[KernelVariant]:
    """The kernels that `call(*args)` launches, in order; they do not run, and what they would write is not written.

    Triton's own rules give type and alignment of an argument; an integer of 1 is a constant to them.

    forced  configurations that are launched in the heuristic's place (tuning.py)
    """
    launches: list[KernelVariant] = []

    def record(kernel: JITFunction, grid: object) -> Callable[..., None]:
        return lambda *args, **options: launches.append(_variant(kernel, args, options))

    launch = KernelInterface.__getitem__
    KernelInterface.__getitem__ = record
    try:
        with trial(forced):
            call(*args)
    finally:
        KernelInterface.__getitem__ = launch
    return launches


def _variant(kernel: JITFunction, args: tuple[object, ...], options: dict[str, Any]) -> KernelVariant:
    from triton.backends.compiler import BaseBackend
    from triton.runtime.jit import native_specialize_impl

    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in options.items() if name in kernel.arg_names}
    hints, compiled = kernel.fn.__annotations__, isinstance(kernel, JITFunction)
    constants = {name: value for name, value in values.items() if hints.get(name) in ("tl.constexpr", tl.constexpr)}
    alike = kernel.do_not_specialize if compiled else kernel.kwargs["do_not_specialize"]  # the interpreter's function
    signature, unaligned = {}, []
    for name in kernel.arg_names:
        if name not in constants:
            spec, aligned = native_specialize_impl(BaseBackend, values[name], False, name not in (alike or ()), True)
            if spec == "constexpr":
                constants[name] = values[name]
            else:
                signature[name] = spec
                if not aligned and spec[0] in "*iu":
                    unaligned.append(name)
    chosen = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    fusion = options.get("enable_fp_fusion", True)
    return KernelVariant(kernel, signature, constants, tuple(unaligned), fp_fusion=fusion, **chosen)


def plan_of(groups: int, seq_len: int, active: float = 1.0, update: float = 1.0, documents: bool = False) -> MaskPlan:
    """A sequence for `record_launches`, of two labels that take turns token by token, or of two documents of them.

    active  of the second label's tokens, for every group but the first
    update  of the second label's tokens, for the first group and for joint parameters
    """
    ones = (1.0,) * groups
    tables = Tables(
        ("first", "second"),
        tuple(map(str, range(groups))),
        (ones, (1.0, *(active,) * (groups - 1))),
        (ones, ones),
        dict.fromkeys(PROJECTIONS, (ones, (update, *ones[1:]))),
        dict.fromkeys(JOINT_KINDS, (1.0, update)),
    )
    runs = merge_label_runs([token % 2 for token in range(seq_len)], [1] * seq_len)
    cut = ((0, seq_len // 2), (seq_len // 2, seq_len)) if documents else None
    return MaskPlan(tables, runs, 1, seq_len, cut)
