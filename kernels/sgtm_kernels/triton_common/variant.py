"""What a kernel can be launched as; an op's kernel.py lists its own for the ahead-of-time suite (aot.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton import JITFunction


@dataclass(frozen=True)
class KernelVariant:
    """One kernel in one configuration. An op's kernel.py lists its own in `variants() -> list[KernelVariant]`.

    kernel     the `@triton.jit` function
    signature  type of every argument that is not a constexpr: `*bf16`, `*fp32`, `i32`, `fp32`, ...
    constants  value of every constexpr
    unaligned  arguments that are not multiples of 16 (pointers: of 16 bytes); all others are compiled as such
    fp_fusion  whether a multiplication and an addition may become one instruction, with one rounding
    tensor_cores  whether it must use them
    columns    on sm_90, those of its tensor-core instructions (HGMMA), ascending; None: any
    width      bits of the widest access to global memory, at least
    wide       words of so many bits that instructions access, at least; narrower accesses are no such words
    narrow     instructions that access 8 or 16 bits of global memory, at most: single values, rows that begin anywhere
    narrower   instructions that access words narrower than `width`, at most; None: any number
    programs   how many a multiprocessor of sm_90 must hold at once, by their registers and shared memory
    spill      why registers may spill here; None: they may not
    spill_on   the architectures where they may
    first_arch  the oldest architecture that it is launched on
    """

    kernel: JITFunction
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 3
    unaligned: tuple[str, ...] = ()
    fp_fusion: bool = True
    tensor_cores: bool = False
    columns: tuple[int, ...] | None = None
    width: int = 128
    wide: int = 1
    narrow: int = 0
    narrower: int | None = None
    programs: int = 1
    spill: str | None = None
    spill_on: tuple[int, ...] = (80, 90, 100)
    first_arch: int = 80

    @staticmethod
    def words(elements: int, dtype: str, warps: int) -> int:
        """Of 128 bits, that each thread takes of so many elements of `bf16`, `fp16` or `fp32`; `wide` adds them up."""
        return elements * (4 if dtype == "fp32" else 2) // (16 * 32 * warps)

    @property
    def operands(self) -> str:
        """`half` if an operand is in half precision, else `fp32`."""
        kinds = (*self.signature.values(), *map(str, self.constants.values()))
        return "half" if any(kind in ("*bf16", "*fp16", "bf16", "fp16") for kind in kinds) else "fp32"

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
