"""How many runs at once, with how many threads and how much memory, on this machine."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import psutil
import torch

from sgtm.distributed.env import device_type
from sgtm.estimate.memory import memory
from sgtm.estimate.units import GB
from sgtm.files import write_atomically
from sgtm.process.cores import usable_cores
from sgtm.sweep.file import Run, Sweep

PROCESS = 0.6 * GB
"""Of a training process beside what `sgtm estimate` estimates: 0.53 GB with a model of a few thousand parameters."""


@dataclass(frozen=True)
class Room:
    """
    jobs     runs at once, at most
    threads  of each on a CPU (OMP_NUM_THREADS); None on a GPU: as the environment says
    memory   bytes that all together may take of this machine; infinite on GPUs, and where `--jobs` decides
    devices  values of CUDA_VISIBLE_DEVICES, one for each run at a time; empty on a CPU
    """

    jobs: int
    threads: int | None
    memory: float
    devices: tuple[str, ...] = ()

    def environment(self, device: str | None) -> dict[str, str]:
        threads = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        return threads | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})


def find_room(sweep: Sweep, jobs: int | None = None, threads: int | None = None) -> Room:
    """Room for the runs of a sweep.

    jobs     so many at once, whatever the memory (on GPUs: at most one on each); None: as many as there is room for
    threads  of each run on a CPU; None: those of the sweep's first call, else OMP_NUM_THREADS, else a fair share

    The threads are kept in `<folder>/sweep.json`: another number can add in another order, and a sweep that is
    continued must give the losses of one left alone.
    """
    if device_type() == "cuda":
        devices = _visible_devices()
        at_once = min(jobs or len(devices), len(devices), len(sweep.runs))
        return Room(at_once, None, float("inf"), devices[:at_once])
    cores, available = usable_cores(), psutil.virtual_memory().available
    fitting = max(1, int(available // max(need(run) for run in sweep.runs)))
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = threads or _kept_threads(sweep) or (int(given) if given.isdigit() and int(given) else None)
    if threads is None:
        threads = max(1, cores // min(jobs or cores, cores, len(sweep.runs), fitting))
    at_once = jobs or max(1, min(cores // threads, fitting))
    return Room(min(at_once, len(sweep.runs)), threads, float("inf") if jobs else available)


def keep_threads(sweep: Sweep, room: Room) -> None:
    write_atomically(sweep.folder / "sweep.json", json.dumps({"threads": room.threads}) + "\n")


def need(run: Run) -> float:
    """Bytes of one run on a CPU, as `sgtm estimate` estimates them, and of its process."""
    return memory(run.config, run.config.distributed.zero_stage, 1).peak + PROCESS


def _kept_threads(sweep: Sweep) -> int | None:
    try:
        return json.loads((sweep.folder / "sweep.json").read_text())["threads"]
    except (OSError, ValueError, KeyError):
        return None


def _visible_devices() -> tuple[str, ...]:
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return tuple(named or map(str, range(torch.cuda.device_count())))
