"""`sgtm doctor`: what this machine has, what is missing for what, as plain text for a bug report.

Nothing here fails: a package that is absent, or a kernel backend that does not import, is a finding. Nothing compiled
is required, so no compiler is looked for.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

import psutil

from sgtm.process.cores import usable_cores
from sgtm.words import counted
from sgtm_kernels.measurement import cpu_model, cpuinfo, driver, installed

if TYPE_CHECKING:
    from sgtm.config import Config

# fmt: off
PACKAGES = (
    "torch", "deepspeed", "triton", "transformers", "tokenizers", "datasets", "pyarrow", "safetensors",
    "numpy", "pydantic", "wandb", "rich", "matplotlib", "zstandard", "flash-attn",
)
# fmt: on

# What each serves; everything else in PACKAGES is needed by everything and installed with sgtm.
OPTIONAL = {
    "triton": "Triton kernels; it comes with CUDA builds of torch on Linux",
    "flash-attn": "attention over windows and documents on a GPU, in bf16; without it FlexAttention does them",
}
LAUNCHERS = {
    "torchrun": "several processes on one machine, or several machines with one command on each",
    "deepspeed": "the deepspeed launcher",
    "pdsh": "the deepspeed launcher over several machines",
    "srun": "Slurm, launch/slurm.sbatch",
}
# fmt: off
VARIABLES = (
    "SGTM_KERNELS", "SGTM_ATTENTION", "SGTM_LINEAR", "SGTM_TUNED", "SGTM_TRACEBACK", "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG", "DS_ACCELERATOR", "DS_BUILD_OPS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "RANK",
    "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME", "TRITON_CACHE_DIR", "TRITON_INTERPRET", "TORCHINDUCTOR_CACHE_DIR",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTHONPATH", "HF_HOME", "HF_HUB_OFFLINE", "WANDB_MODE",
)
# fmt: on
PASSED = "passed"
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
GIB = 2**30


def findings(check: Config | None = None) -> dict:
    """Everything the doctor sees, by section; plain JSON types only.

    check  config whose kernels are run against the reference too (sgtm/distributed/self_check.py)
    """
    import torch

    from sgtm import __version__

    versions = {name: installed(name) for name in PACKAGES}
    return {
        "software": {
            "sgtm": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "executable": sys.executable,
            **{name: number or "not installed" for name, number in versions.items()},
        },
        "cpu": _cpu(),
        "memory": _memory(),
        "gpus": _gpus(),
        "backends": _backends(),
        "dispatch": _dispatch(),
        **({"self-check": _self_check(check)} if check else {}),
        "tuning": _tuning(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "missing": {
            **{name: use for name, use in OPTIONAL.items() if versions[name] is None},
            **{name: use for name, use in LAUNCHERS.items() if not _launcher(name)},
            **({} if torch.cuda.is_available() else {"GPU": "training at speed; on the CPU everything runs, slowly"}),
        },
    }


def print_findings(as_json: bool = False, check: Config | None = None) -> int:
    """Print the findings as aligned text, or as JSON; returns the exit status, 1 if the self-check failed."""
    sections = findings(check)
    status = int(any(verdict != PASSED for op, verdict in sections.get("self-check", {}).items() if op != "config"))
    if as_json:
        print(json.dumps(sections, indent=2))
        return status
    for section, entries in sections.items():
        print(f"{section if section != 'missing' else 'missing (and what for)'}:")
        width = max(map(len, entries), default=0)
        for name, value in entries.items():
            print(f"  {name:<{width}}  {value}")
        if not entries:
            print("  none" if section != "environment" else "  nothing set")
    return status


def _launcher(name: str) -> str | None:
    """A launcher on the PATH, or beside the interpreter, where a virtual environment has its own."""
    return shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))


def _cpu() -> dict:
    import torch

    flags = _cpu_flags()
    return {
        "model": cpu_model(),
        "cores": f"{psutil.cpu_count(logical=False)} ({psutil.cpu_count()} threads), {usable_cores()} usable here",
        "torch threads": torch.get_num_threads(),
        "instructions": ", ".join(flag for flag in CPU_FLAGS if flag in flags) or "none of " + ", ".join(CPU_FLAGS),
        "bf16 matmul": _matmul_ratio(),
    }


def _cpu_flags() -> set[str]:
    return set(cpuinfo("flags").split())


def _matmul_ratio(size: int = 512, repeats: int = 3) -> str:
    """Time of a bf16 matmul against fp32: below 1, `train.precision: bf16` is worth it on this CPU."""
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(size, size, dtype=dtype)
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times[1:])
    ratio = seconds[torch.bfloat16] / seconds[torch.float32]
    return f"{ratio:.2f} of the time of fp32 ({2 * size**3 / seconds[torch.bfloat16] / 1e9:.0f} GFLOP/s)"


def _memory() -> dict:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(os.getcwd())
    shared = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None
    return {
        "RAM": f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free",
        "disk here": f"{disk.free / GIB:.1f} of {disk.total / GIB:.1f} GiB free",
        "/dev/shm": "absent" if shared is None else f"{shared / GIB:.1f} GiB",
    }


def _gpus() -> dict:
    import torch

    if not torch.cuda.is_available():
        return {}
    entries = {"CUDA of torch": torch.version.cuda or f"ROCm {torch.version.hip}", "driver": driver() or "unknown"}
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        capability = f"sm_{device.major}{device.minor}"
        entries[f"cuda:{i}"] = f"{device.name}, {capability}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    return entries


def _backends() -> dict:
    """For every op the kernel backends that import here, the one of `auto` marked; why one is unusable, once."""
    from sgtm.distributed.env import device_type
    from sgtm_kernels import dispatch

    try:
        chosen = dispatch.resolve("auto", device=device_type())
    except ValueError as error:
        return {"auto": f"broken: {error}"}
    problems = {backend: problem for backend in dispatch.BACKENDS if (problem := dispatch.unusable(backend))}
    entries = {}
    for op in dispatch.OPS:
        states = []
        for backend in dispatch.BACKENDS:
            mark = " (auto)" if backend == chosen else ""
            problem = " unusable" if backend in problems else _import_problem(dispatch.module_name(op, backend))
            states.append(f"{backend}{mark}{problem}")
        entries[op] = ", ".join(states)
    return entries | {f"{backend} is unusable": problem for backend, problem in problems.items()}


def _dispatch() -> dict:
    """What `kernels.backend: auto` is here and why, and the choices inside the backends."""
    from sgtm.distributed.env import device_type
    from sgtm_kernels import dispatch

    def auto() -> str:
        chosen, why = dispatch.explain("auto", device=device_type())
        return f"{chosen} for every op: {why}"

    def attention() -> str:
        named = dispatch.algorithm("SGTM_ATTENTION")
        by_itself = "SDPA; windows and documents on a GPU by flash_attn where it imports, else by FlexAttention"
        return f"{named} (SGTM_ATTENTION)" if named else by_itself

    def linear() -> str:
        named = dispatch.algorithm("SGTM_LINEAR")
        algorithm = f"{named} (SGTM_LINEAR)" if named else "as tuned, else masked (SGTM_LINEAR names one)"
        return f"dW of labels that change from token to token: {algorithm}"

    rows = {"auto": auto, "torch, attention": attention}
    if find_spec("triton") is not None:
        rows["triton, linear"] = linear
    return {name: _or_broken(row) for name, row in rows.items()}


def _self_check(config: Config) -> dict:
    """By op, whether this config's kernels match the reference on this device; never from the cache."""
    from sgtm.distributed.env import device_type, kernel_backend, use_deterministic_algorithms
    from sgtm.distributed.self_check import self_check

    try:
        backend = kernel_backend(config.kernels, config.train.precision)
        if config.kernels.deterministic and device_type() == "cuda":
            use_deterministic_algorithms()
        problems = self_check(config, backend, repeat=True)
    except ValueError as error:
        return {"config": config.name, "all ops": f"broken: {error}"}
    about = f"{config.name}, backend {backend}, {config.train.precision}"
    return {"config": about, **{op: problem or PASSED for op, problem in problems.items()}}


def _or_broken(row: Callable[[], str]) -> str:
    try:
        return row()
    except Exception as error:  # a wrong name, or a broken Triton: the finding
        return f"broken: {error}"


def _tuning() -> dict:
    """What decides the configurations of the Triton kernels, by device."""
    import torch

    from sgtm_kernels.triton_common.tuning import TUNED, table_of

    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]
    entries = {}
    for device in devices:
        try:
            table = table_of(device)
            entries[str(device)] = (
                f"{table.path}, {counted(len(table.entries), 'entry', 'entries')}" if table else "heuristics, no table"
            )
        except ValueError as error:
            entries[str(device)] = f"broken: {error}"
    entries["tables in"] = str(TUNED)
    return entries


def _import_problem(module: str) -> str:
    try:
        import_module(module)
    except Exception as error:  # a broken driver or build can raise anything; that is the finding
        return f" broken: {type(error).__name__}: {error}"
    return ""
