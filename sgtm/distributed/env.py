"""The environment a rank runs in: who launched it, and defaults that must stand before deepspeed is imported.

Alone, a process is rank 0 of 1 and needs nothing. Under `torchrun`, the `deepspeed` launcher or `srun` its place comes
from the variables they set. Defaults never override what the user has set.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sgtm.cores import usable_cores
from sgtm_kernels.dispatch import resolve

if TYPE_CHECKING:
    from sgtm.config import Config

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by train.precision
TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """Place of this process; `launcher` is `none`, `torchrun`, `deepspeed`, `srun` or `env` (set by hand)."""

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def detect_launch(environ: dict[str, str] | None = None) -> Launch:
    """Place of this process, from the environment.

    Raises ValueError that names the variables where only some of what a launcher sets is there, or one is not a number.
    """
    env = dict(os.environ if environ is None else environ)
    launcher = _launcher(env)
    if launcher == "none":
        return Launch("none")
    said_by = ("SLURM_STEP_ID",) if launcher == "srun" else (*TORCH_VARIABLES, "TORCHELASTIC_RUN_ID")
    env = _in_torch_names(env)
    missing = [name for name in TORCH_VARIABLES if name not in env]
    if missing:
        raise ValueError(
            f"launched by {launcher}, but {', '.join(missing)} not set; start with torchrun, deepspeed or "
            f"launch/slurm.sbatch, or unset {', '.join(n for n in said_by if n in env)} to run one process"
        )
    try:
        rank, size, local = (int(env[name]) for name in TORCH_VARIABLES[:3])
        local_size = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or 0)
    except ValueError:
        seen = {name: env[name] for name in TORCH_VARIABLES[:3]}
        raise ValueError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers, got {seen}") from None
    if not 0 <= rank < size:
        raise ValueError(f"RANK {rank} is none of the ranks 0 to WORLD_SIZE - 1; WORLD_SIZE is {size}")
    return Launch(launcher, rank, size, local, local_size or _slurm_tasks_here(env))


def on_one_machine() -> bool:
    """Whether all ranks are on this machine, as far as a launcher says."""
    try:
        launch = detect_launch()
    except ValueError:  # a process group that the caller has made
        return True
    return launch.launcher in ("none", "env") or launch.local_world_size == launch.world_size


def rank_and_size(environ: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Rank and number of ranks as the launcher has written them, unchecked: for messages."""
    env = _in_torch_names(dict(os.environ if environ is None else environ))
    return env.get("RANK", "0"), env.get("WORLD_SIZE", "1")


def _in_torch_names(env: dict[str, str]) -> dict[str, str]:
    """The variables, and under srun what it says of this process by the names of torch."""
    if _launcher(env) != "srun":
        return env
    found = {"RANK": env.get("SLURM_PROCID"), "WORLD_SIZE": _step_tasks(env), "LOCAL_RANK": env.get("SLURM_LOCALID")}
    return env | {name: value for name, value in found.items() if value is not None}


def _step_tasks(env: dict[str, str]) -> str:
    """Processes of this step; SLURM_NTASKS is what the job may start, also where an interactive step has one."""
    return env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")


def _slurm_tasks_here(env: dict[str, str]) -> int:
    """Ranks on this node by SLURM's account of the step, one count for each node: `2,1`, `4(x2)`, `2(x3),1`.

    1 where there is none. Raises ValueError for anything else.
    """
    text, node = env.get("SLURM_STEP_TASKS_PER_NODE", "1"), env.get("SLURM_NODEID", "0")
    try:
        counts: list[int] = []
        for item in text.split(","):
            count, _, times = item.partition("(x")
            counts += [int(count)] * int(times.removesuffix(")") or 1)
        return counts[int(node)]
    except (ValueError, IndexError):
        raise ValueError(f"SLURM_STEP_TASKS_PER_NODE {text!r} says nothing of node SLURM_NODEID {node!r}") from None


def _launcher(env: dict[str, str]) -> str:
    if "TORCHELASTIC_RUN_ID" in env:
        return "torchrun"
    if "RANK" in env and "CROSS_RANK" in env:
        return "deepspeed"
    if "RANK" in env or "WORLD_SIZE" in env:
        return "env"
    # SLURM_STEP_ID: inside srun. In a batch script's own shell SLURM_NTASKS is set, but nobody else is running.
    if "SLURM_STEP_ID" in env and _step_tasks(env) != "1":
        return "srun"
    return "none"


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
    """`cuda` or `cpu`: what DS_ACCELERATOR says, else whether there is a GPU."""
    return os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")


def kernel_backend(config: Config) -> str:
    """The kernel backend of a run on its device, in its precision. Raises ValueError as `sgtm_kernels.dispatch`."""
    return resolve(config.kernels.backend, DTYPES[config.train.precision], device_type())


def gpu_of(launch: Launch, visible: int) -> int:
    """Index of this rank's GPU among the `visible` ones; 0 where the launcher shows each rank its own alone.

    Raises ValueError where the ranks of this node are more than its GPUs.
    """
    if visible == 1:
        return 0
    if launch.local_rank >= visible:
        ranks = max(launch.local_world_size, launch.local_rank + 1)
        raise ValueError(
            f"{ranks} ranks on this node, but {visible} GPUs are visible to rank {launch.rank}; start one rank for "
            f"each GPU, or set CUDA_VISIBLE_DEVICES"
        )
    return launch.local_rank


def cpu_threads(launch: Launch) -> int | None:
    """Threads for each rank on a CPU, or None to keep torch's choice.

    torchrun sets OMP_NUM_THREADS to 1, and without it every rank takes all cores: both are slow, so the cores that a
    container's quota leaves are divided between the ranks here. A user's own OMP_NUM_THREADS stands: any of one
    process, above 1 of several.
    """
    given = os.environ.get("OMP_NUM_THREADS")
    if given is not None and (launch.local_world_size == 1 or given != "1"):
        return None
    threads = max(1, usable_cores() // launch.local_world_size)
    return threads if launch.local_world_size > 1 or threads < torch.get_num_threads() else None


def use_deterministic_algorithms() -> None:
    """In torch and cuBLAS, for the rest of the process, before CUDA is first used.

    An op without a deterministic algorithm raises RuntimeError. A mere warning is not an option: SDPA's backward passes
    are deterministic only where they have to be (sgtm_kernels/attention/public.py).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would write every torch.empty


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
