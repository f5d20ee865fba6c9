"""Who launched this process, and its rank, from the environment alone.

Alone, a process is rank 0 of 1 and needs nothing. Under `torchrun`, the `deepspeed` launcher or `srun` its rank comes
from the variables they set. Nothing here imports torch, as every printed error asks for the rank.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class RankInfo:
    """Rank of this process; `launcher` is `none`, `torchrun`, `deepspeed`, `srun` or `env` (set by hand)."""

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def detect_launch(environ: dict[str, str] | None = None) -> RankInfo:
    """Rank of this process, from the environment.

    Raises ValueError that names the variables where only some of what a launcher sets is there, or one is not a number.
    """
    env = dict(os.environ if environ is None else environ)
    launcher = _launcher(env)
    if launcher == "none":
        return RankInfo("none")
    variables = ("SLURM_STEP_ID",) if launcher == "srun" else (*TORCH_VARIABLES, "TORCHELASTIC_RUN_ID")
    env = _in_torch_names(env)
    missing = [name for name in TORCH_VARIABLES if name not in env]
    if missing:
        raise ValueError(
            f"launched by {launcher}, but {', '.join(missing)} not set; start with torchrun, deepspeed or "
            f"launch/slurm.sbatch, or unset {', '.join(n for n in variables if n in env)} to run one process"
        )
    try:
        rank, size, local = (int(env[name]) for name in TORCH_VARIABLES[:3])
        local_size = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or 0)
    except ValueError:
        seen = {name: env[name] for name in TORCH_VARIABLES[:3]}
        raise ValueError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers, got {seen}") from None
    if not 0 <= rank < size:
        raise ValueError(f"RANK {rank} is none of the ranks 0 to WORLD_SIZE - 1; WORLD_SIZE is {size}")
    return RankInfo(launcher, rank, size, local, local_size or _slurm_tasks_here(env))


def on_one_machine() -> bool:
    """Whether all ranks are on this machine, as far as the environment shows."""
    try:
        rank_info = detect_launch()
    except ValueError:  # a process group that the caller has made
        return True
    return rank_info.launcher in ("none", "env") or rank_info.local_world_size == rank_info.world_size


def launcher(environ: Mapping[str, str] | None = None) -> str:
    """What started this process among others: `torchrun`, `deepspeed`, `srun`, `env` (variables of unknown origin) or
    `none`."""
    return _launcher(dict(os.environ if environ is None else environ))


def rank_and_size(environ: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Rank and number of ranks as the launcher has written them, unchecked: for messages."""
    env = _in_torch_names(dict(os.environ if environ is None else environ))
    return env.get("RANK", "0"), env.get("WORLD_SIZE", "1")


def _in_torch_names(env: dict[str, str]) -> dict[str, str]:
    """The variables, and under srun its own for this process by the names of torch."""
    if _launcher(env) != "srun":
        return env
    variables = {
        "RANK": env.get("SLURM_PROCID"),
        "WORLD_SIZE": _step_tasks(env),
        "LOCAL_RANK": env.get("SLURM_LOCALID"),
    }
    return env | {name: value for name, value in variables.items() if value is not None}


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
        raise ValueError(f"SLURM_STEP_TASKS_PER_NODE {text!r} has no count for node SLURM_NODEID {node!r}") from None


def _launcher(env: dict[str, str]) -> str:
    if "TORCHELASTIC_RUN_ID" in env:
        return "torchrun"
    if "RANK" in env and "CROSS_RANK" in env:
        return "deepspeed"
    if "RANK" in env or "WORLD_SIZE" in env:
        return "env"
    # SLURM_STEP_ID is set inside srun alone. A batch script's own shell has SLURM_NTASKS too, but is the only process.
    if "SLURM_STEP_ID" in env and _step_tasks(env) != "1":
        return "srun"
    return "none"
