"""Compile every Triton kernel ahead of time, without a GPU, and look at what came out.

    python -m sgtm_kernels.tools.aot [--op linear,mlp] [--arch 80,90,100] [--operands half,fp32] [--jobs 2]

Every kernel, as its op launches it (`variants()`), with every block size and combination of flags (compared with real
calls in tests/kernels/test_launches.py), at some widths, for sm_80, sm_90 and sm_100: it must compile, fit into the
shared memory of the architecture, spill no register (stack of 0; an exception is listed with its reason beside the
kernel), have tensor-core instructions where it is meant to, of the shape that it is meant to have, read and write
global memory in words as wide as its rows allow, and leave registers and shared memory for as many programs as should
run at once. `KernelVariant` states what is meant.
Every kernel is compiled once for an architecture and its machine code (SASS) read once, that of many kernels together,
as the disassembler takes longer to start than to read. Prints a table and exits 1 where something does not hold.
Source of the limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

import argparse
import os
import re
import struct
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from itertools import accumulate, chain
from pathlib import Path

from sgtm_kernels.dispatch import OPS
from sgtm_kernels.tools.launches import KernelVariant

SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}  # of a thread block
SHARED_OF_ALL, RESERVED = {80: 167_936, 90: 233_472, 100: 233_472}, 1024  # of a multiprocessor; beside each block's own
REGISTERS, REGISTER_UNIT, WARPS = 65_536, 256, 64  # of a multiprocessor; a warp's registers are a multiple of the unit
TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
HGMMA = re.compile(r"\bHGMMA\.\d+x(\d+)x")
# Loads and stores of global memory with their modifiers; copies to shared memory among them. No modifier: 32 bits.
ACCESS = re.compile(r"\b(?:LDG|STG|LDGSTS)\b([.\w]*)")
WIDTH = re.compile(r"\.(?:[US](8|16)|(64|128|256))\b")
INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]+)\*/")  # begins with its address
OPERANDS = ("half", "fp32")
AT_ONCE = 16  # variants that are disassembled together
BULK = re.compile(r"\b(?:UTMALDG|UBLKCP)\b")  # tiles fetched by the copy engine: as wide as can be


@dataclass
class CompileOutcome:
    """What the compiler made of one variant on one architecture; `problems` is empty where all is well."""

    name: str
    arch: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    tensor_cores: bool = False
    columns: list[int] = field(default_factory=list)  # of its HGMMA instructions
    widths: dict[int, int] = field(default_factory=dict)  # bits of an access to global memory: number of instructions
    problems: list[str] = field(default_factory=list)


def all_variants(ops: tuple[str, ...] = OPS) -> list[tuple[str, int, KernelVariant]]:
    """(op, index, variant) of every op that has kernels."""
    return [(op, i, variant) for op in ops for i, variant in enumerate(_of(op))]


@cache
def _of(op: str) -> list[KernelVariant]:
    return import_module(f"sgtm_kernels.{op}.variants").variants()


def examine(variants: Sequence[KernelVariant], arch: int) -> list[CompileOutcome]:
    """Compile each variant for one architecture and check it."""
    outcomes, cubins = [CompileOutcome(variant.name, arch) for variant in variants], {}
    for i, variant in enumerate(variants):
        try:
            compiled = _compile(variant, arch)
        except Exception as error:  # whatever the compiler raises is the finding
            outcomes[i].problems.append(f"does not compile: {type(error).__name__}: {str(error)[:500]}")
            continue
        outcomes[i].shared, cubins[i] = compiled.metadata.shared, compiled.asm["cubin"]
    for (i, cubin), code in zip(cubins.items(), disassemble(list(cubins.values()), arch), strict=True):
        outcome, variant = outcomes[i], variants[i]
        outcome.registers, outcome.stack = _resources(cubin)
        outcome.tensor_cores = TENSOR_CORES.search(code) is not None
        outcome.columns = sorted({int(columns) for columns in HGMMA.findall(code)})
        outcome.widths = access_widths(code)
        outcome.problems += _problems(outcome, variant)
    return outcomes


def _compile(variant: KernelVariant, arch: int):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    aligned = [n for n, type_name in variant.signature.items() if n not in variant.unaligned and type_name[0] in "*iu"]
    source = ASTSource(
        variant.kernel,
        {n: variant.signature.get(n, "constexpr") for n in names},
        {(names.index(n),): value for n, value in variant.constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    options["enable_fp_fusion"] = variant.fp_fusion
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def access_widths(code: str) -> dict[int, int]:
    """How many instructions of this SASS access global memory in words of so many bits."""
    counts: Counter[int] = Counter()
    for modifiers in ACCESS.findall(code):
        width = WIDTH.search(modifiers)
        counts[int(width.group(1) or width.group(2)) if width else 32] += 1
    if bulk := len(BULK.findall(code)):
        counts[128] += bulk
    return dict(sorted(counts.items()))


def _problems(o: CompileOutcome, variant: KernelVariant) -> Iterator[str]:
    if o.shared > SHARED_BYTES[o.arch]:
        yield f"{o.shared} bytes of shared memory, {SHARED_BYTES[o.arch]} there are"
    if o.stack and (variant.spill is None or o.arch not in variant.spill_on):
        yield f"spills: {o.stack} bytes of stack"
    if variant.tensor_cores and not o.tensor_cores:
        yield "no tensor-core instruction"
    if o.arch == 90 and variant.hgmma_columns is not None and tuple(o.columns) != variant.hgmma_columns:
        yield f"HGMMA of {o.columns} columns, {list(variant.hgmma_columns)} wanted"
    if max(o.widths) < variant.widest_bits:
        yield f"widest access of {max(o.widths)} bits, {variant.widest_bits} wanted"
    wide = sum(n * (width // variant.widest_bits) for width, n in o.widths.items())
    if wide < variant.min_wide_words:
        yield f"{wide} accesses of {variant.widest_bits} bits, {variant.min_wide_words} wanted"
    narrow = sum(n for width, n in o.widths.items() if width < 32)
    if narrow > variant.max_subwords:
        yield f"{narrow} narrow accesses of 8 or 16 bits, {variant.max_subwords} allowed"
    narrower = sum(n for width, n in o.widths.items() if width < variant.widest_bits)
    if variant.max_below_widest is not None and narrower > variant.max_below_widest:
        yield f"{narrower} accesses narrower than {variant.widest_bits} bits, {variant.max_below_widest} allowed"
    of_warp = -(-32 * o.registers // REGISTER_UNIT) * REGISTER_UNIT
    warps = min(WARPS, REGISTERS // of_warp)
    room = min(warps // variant.num_warps, SHARED_OF_ALL[o.arch] // (o.shared + RESERVED))
    if o.arch == 90 and room < variant.min_programs:
        yield f"registers and shared memory for {room} programs at once, {variant.min_programs} wanted"


def disassemble(cubins: Sequence[bytes], arch: int) -> list[str]:
    """The SASS of each cubin, by the nvdisasm that comes with Triton."""
    codes = [_machine_code(cubin) for cubin in cubins]
    ends = list(accumulate(map(len, codes)))
    listings: list[list[str]] = [[] for _ in codes]
    for line in _run_tool("nvdisasm", b"".join(codes), "--binary", f"SM{arch}" + "a" * (arch >= 90)).splitlines():
        if instruction := INSTRUCTION.match(line):
            listings[bisect_right(ends, int(instruction.group(1), 16))].append(line)
    return ["\n".join(lines) for lines in listings]


def _machine_code(cubin: bytes) -> bytes:
    """The section `.text.<kernel>` of an ELF file of 64 bits. Raises ValueError where there is not one of them."""
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<I4x16xQQ", cubin, table + size * i) for i in range(count)]  # name, offset, length
    text = [section for section in sections if cubin.startswith(b".text.", sections[names][1] + section[0])]
    if len(text) != 1:
        raise ValueError(f"{len(text)} kernels in a cubin")
    _, offset, length = text[0]
    return cubin[offset : offset + length]


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread. Raises ValueError where cuobjdump prints none."""
    usage = _run_tool("cuobjdump", cubin, "--dump-resource-usage")
    numbers = [re.search(rf"{name}:(\d+)", usage) for name in ("REG", "STACK")]
    if None in numbers:
        raise ValueError(f"no registers or stack in the resource usage that cuobjdump prints: {usage[:200]!r}")
    registers, stack = (int(number.group(1)) for number in numbers if number)
    return registers, stack


def _run_tool(name: str, code: bytes, *options: str) -> str:
    """What one of the tools that come with Triton prints of a file with this content."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [str(tools / name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _examine(job: tuple[str, list[int], int]) -> list[CompileOutcome]:
    op, indices, arch = job
    variants = _of(op)
    return examine([variants[i] for i in indices], arch)


def _of_known(known: Collection) -> Callable[[str], list]:
    """Values with commas between them, each as one of `known` is written."""
    by_name = {str(value): value for value in known}

    def parse(text: str) -> list:
        if unknown := [name for name in text.split(",") if name not in by_name]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(by_name)}")
        return [by_name[name] for name in text.split(",")]

    return parse


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ops, arches = ",".join(OPS), ",".join(map(str, SHARED_BYTES))
    parser.add_argument("--op", type=_of_known(OPS), default=ops, help=f"ops, of {ops} (default: all)")
    parser.add_argument(
        "--arch", type=_of_known(SHARED_BYTES), default=arches, help=f"architectures, of {arches} (default: all)"
    )
    parser.add_argument(
        "--operands",
        type=_of_known(OPERANDS),
        default=",".join(OPERANDS),
        help="half: kernels with an operand in half precision; fp32: the others (default: both)",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time (default: one a core)")
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    jobs = [
        (op, indices[start : start + AT_ONCE], arch)
        for op in args.op
        for arch in args.arch
        for indices in [[i for i, v in enumerate(_of(op)) if arch in v.arches and v.operands in args.operands]]
        for start in range(0, len(indices), AT_ONCE)
    ]
    compiled = failed = 0
    write = partial(print, flush=True)
    write(f"{'arch':>5} {'regs':>4} {'stack':>5} {'shared':>7} {'tensor cores':12} {'accesses':28} kernel")
    with ProcessPoolExecutor(args.jobs) as pool:
        for o in chain.from_iterable(pool.map(_examine, jobs)):
            shapes = ",".join(f"n{columns}" for columns in o.columns)
            cores = shapes or ("yes" if o.tensor_cores else "-")
            widths = " ".join(f"{n}x{width}" for width, n in o.widths.items())
            write(f"{o.arch:5} {o.registers:4} {o.stack:5} {o.shared:7} {cores:12} {widths:28} {o.name}")
            for problem in o.problems:
                write(f"      PROBLEM: {problem}")
            compiled, failed = compiled + 1, failed + bool(o.problems)
    write(f"{compiled} compiled, {failed} with problems")
    return int(failed > 0 or not compiled)


if __name__ == "__main__":
    sys.exit(main())
