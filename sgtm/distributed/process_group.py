"""Joining the process group of a run, and leaving it; torch alone, without DeepSpeed."""

from __future__ import annotations

import atexit
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from sgtm.config.sections import DistributedConfig, KernelsConfig
from sgtm.distributed import watchdog
from sgtm.distributed.env import (
    cpu_threads,
    device_type,
    gpu_of,
    keep_freed_memory,
    use_deterministic_algorithms,
)
from sgtm.process.ranks import RankInfo, detect_launch

FOREVER = timedelta(days=1000)
_joined: RankInfo | None = None


def init_distributed(distributed: DistributedConfig, kernels: KernelsConfig) -> RankInfo:
    """Join the process group: alone, or where a launcher has put this process. Called again it returns the same.

    A rank that then does not move for `distributed.timeout_minutes` ends the run (watchdog.py). Raises ValueError for
    an environment that only half describes a launch and for more ranks than GPUs, ConnectionError where the ranks do
    not meet.
    """
    global _joined
    if not dist.is_initialized():
        _joined = _join(distributed, kernels)
    elif _joined is None:  # the caller has made the group
        _joined = RankInfo("env", dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
    return _joined


def _join(distributed: DistributedConfig, kernels: KernelsConfig) -> RankInfo:
    rank_info = detect_launch()
    index, on_gpu = rank_info.local_rank, device_type() == "cuda"
    if on_gpu:
        if kernels.deterministic:
            use_deterministic_algorithms()
        index = gpu_of(rank_info, torch.cuda.device_count())
        torch.cuda.set_device(index)
    else:
        keep_freed_memory()
        if threads := cpu_threads(rank_info):
            torch.set_num_threads(threads)
    os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed picks its device by it
    timeout = timedelta(minutes=distributed.timeout_minutes)
    backend = "nccl" if on_gpu else "gloo"
    if rank_info.launcher == "none":  # a store in memory: no port to be free
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        _meet(rank_info, backend, timeout)
        if rank_info.world_size > 1:
            watchdog.start(rank_info.rank, rank_info.world_size, distributed.timeout_minutes)
        outlast_watchdog(distributed)
    atexit.register(leave_distributed)
    return rank_info


def _meet(rank_info: RankInfo, backend: str, timeout: timedelta) -> None:
    try:
        dist.init_process_group(backend, rank=rank_info.rank, world_size=rank_info.world_size, timeout=timeout)
    except dist.DistError as error:
        raise ConnectionError(
            f"the ranks did not meet at MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT "
            f"{os.environ['MASTER_PORT']} within distributed.timeout_minutes {timeout.total_seconds() / 60:g}: rank "
            f"{rank_info.rank} of {rank_info.world_size}: {str(error).splitlines()[0]}"
        ) from None


def outlast_watchdog(distributed: DistributedConfig) -> None:
    """Let collectives wait until the watchdog ends the run: it prints more, and does not count a suspension.

    Where the caller has made the group there is none, and they wait for `distributed.timeout_minutes` and one more.
    DeepSpeed's groups have torch's own timeouts: 10 minutes with NCCL, whatever is in the config.
    """
    timeout = FOREVER if watchdog.started() else timedelta(minutes=distributed.timeout_minutes + 1)
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def leave_distributed() -> None:
    """Leave the process group at the end of the process.

    Without a barrier, and not with NCCL, where it can wait for ranks that have failed.
    """
    watchdog.leave(0)
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def end_rank(status: int) -> None:
    """End this process now, after what `atexit` has to do, if it is one of several gloo ranks; else do nothing.

    gloo's threads live on while anything holds the group, as DeepSpeed does, and one that asks for the interpreter
    while that is torn down aborts a run which has ended well ("terminate called without an active exception").
    A rank that has failed ends at once with any backend, as leaving the group may wait for the others.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    watchdog.leave(status)
    if status or dist.get_backend() == "gloo":
        if not status:
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
