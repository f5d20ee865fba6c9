"""The environment a rank runs in: its device and threads, and defaults that must stand before deepspeed is imported.

Who launched it: sgtm/process/ranks.py. Defaults never override what the user has set.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from typing import TYPE_CHECKING

import torch

from sgtm.process.cores import usable_cores
from sgtm.process.ranks import RankInfo
from sgtm_kernels.dispatch import resolve

if TYPE_CHECKING:
    from sgtm.config.sections import KernelsConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by train.precision


def set_defaults(cuda: bool) -> None:
    """Environment defaults for this process and its children; call before deepspeed is imported."""
    defaults = {
        # torch and Triton compile into the home directory otherwise, which on clusters is shared and slow
        "TRITON_CACHE_DIR": os.path.join(tempfile.gettempdir(), f"sgtm-triton-{os.getuid()}"),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if not cuda:
        defaults["DS_ACCELERATOR"] = "cpu"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def device_type() -> str:
    """`cuda` or `cpu`: DS_ACCELERATOR, else whether there is a GPU."""
    return os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")


def kernel_backend(kernels: KernelsConfig, precision: str) -> str:
    """The kernel backend of a run on its device, in `train.precision`. Raises ValueError as `sgtm_kernels.dispatch`."""
    return resolve(kernels.backend, DTYPES[precision], device_type())


def gpu_of(rank_info: RankInfo, visible: int) -> int:
    """Index of this rank's GPU among the `visible` ones; 0 where the launcher shows each rank its own alone.

    Raises ValueError where the ranks of this node are more than its GPUs.
    """
    if visible == 1:
        return 0
    if rank_info.local_rank >= visible:
        ranks = max(rank_info.local_world_size, rank_info.local_rank + 1)
        raise ValueError(
            f"{ranks} ranks on this node, but {visible} GPUs are visible to rank {rank_info.rank}; start one rank for "
            f"each GPU, or set CUDA_VISIBLE_DEVICES"
        )
    return rank_info.local_rank


def cpu_threads(rank_info: RankInfo) -> int | None:
    """Threads for each rank on a CPU, or None to keep torch's choice.

    torchrun sets OMP_NUM_THREADS to 1, and without it every rank takes all cores: both are slow, so the cores that a
    container's quota leaves are divided between the ranks here. A user's own OMP_NUM_THREADS stands: any of one
    process, above 1 of several.
    """
    setting = os.environ.get("OMP_NUM_THREADS")
    if setting is not None and (rank_info.local_world_size == 1 or setting != "1"):
        return None
    threads = max(1, usable_cores() // rank_info.local_world_size)
    return threads if rank_info.local_world_size > 1 or threads < torch.get_num_threads() else None


def use_deterministic_algorithms() -> None:
    """In torch and cuBLAS, for the rest of the process, before CUDA is first used.

    An op without a deterministic algorithm raises RuntimeError. A mere warning is not an option: SDPA's backward passes
    are deterministic only where they have to be (sgtm_kernels/attention/public.py).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # It would write every torch.empty. A property of torch's module, which mypy does not see.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed, for the rest of the process; does nothing with another C library.

    It gives large blocks back to the system at every free, so that each step on a CPU pays for its pages again: a
    third of the step at the TinyStories shapes (benchmarks/LOG.md, 2026-11-21). The process then stays as large as it
    has been at its largest.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
