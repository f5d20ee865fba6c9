"""Training the runs of a sweep, several at a time, each in a process of its own.

How many at once, with how many threads and how much memory, follows from this machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil
import torch

from sgtm.config.load import save_config
from sgtm.distributed.env import device_type
from sgtm.estimate.memory import memory
from sgtm.estimate.units import GB
from sgtm.files import write_atomically
from sgtm.process.cores import usable_cores
from sgtm.process.signals import SIGNALS
from sgtm.sweep.file import Run, Sweep
from sgtm.sweep.progress import Progress
from sgtm.sweep.state import final_losses

POLL = 0.1  # seconds
PROCESS = 0.6 * GB
"""Of a training process beside what `sgtm estimate` estimates: 0.53 GB with a model of a few thousand parameters."""


@dataclass(frozen=True)
class Room:
    """What this machine has room for.

    jobs     runs at once, at most
    threads  of each on a CPU (OMP_NUM_THREADS); None on a GPU: that of the environment
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
    setting = os.environ.get("OMP_NUM_THREADS", "")
    threads = threads or _kept_threads(sweep) or (int(setting) if setting.isdigit() and int(setting) else None)
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


class Process(Protocol):
    """What the schedule needs of `subprocess.Popen`."""

    pid: int

    def poll(self) -> int | None: ...


Start = Callable[[list[str], dict[str, str], Path], Process]


@dataclass
class Outcome:
    """
    failed   runs that ended without being finished, with their exit status (negative: the signal)
    stopped  the signal that stopped the sweep, or None
    """

    failed: list[tuple[Run, int]] = field(default_factory=list)
    stopped: int | None = None


def start_process(arguments: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
    """`sgtm ARGUMENTS` with its output at the end of `log`, in a session of its own: Ctrl-C reaches the sweep only."""
    command = [sys.executable, "-m", "sgtm.commands.sweep_child", str(os.getpid()), *arguments]
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def arguments_of(sweep: Sweep, run: Run) -> list[str]:
    """Arguments of `sgtm` that train the run or resume it, after its config has been written for it."""
    file = sweep.folder / "configs" / f"{run.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_config(run.config, file)
    return ["train", str(file), "--resume"]


def log_of(sweep: Sweep, run: Run) -> Path:
    return sweep.folder / "logs" / f"{run.name}.log"


def train_all(
    sweep: Sweep, pending: list[Run], room: Room, progress: Progress, start: Start = start_process
) -> Outcome:
    """Train these runs. One that fails does not stop the others.

    SIGINT, SIGTERM and SIGUSR1 stop all: their processes get SIGTERM, save a checkpoint and end. A second SIGINT kills
    them.
    """
    (sweep.folder / "logs").mkdir(parents=True, exist_ok=True)
    waiting, free = list(pending), list(room.devices)
    running: dict[int, tuple[Run, Process, str | None]] = {}
    outcome = Outcome()
    with Stop() as stop:
        while running or (waiting and not stop.signal):
            while waiting and not stop.signal and _fits(waiting[0], [run for run, *_ in running.values()], room):
                run = waiting.pop(0)
                device = free.pop(0) if room.devices else None
                process = start(arguments_of(sweep, run), room.environment(device), log_of(sweep, run))
                running[process.pid] = run, process, device
                progress.started(run)
            for number in stop.news():
                for pid in running:
                    os.kill(pid, number)
            for pid, (run, process, device) in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[pid]
                free += [] if device is None else [device]
                done = final_losses(run.directory, run.config) is not None
                if not done and not stop.signal:
                    outcome.failed.append((run, status))
                progress.ended(run, done, status)
            progress.update()
            time.sleep(POLL)
    outcome.stopped = stop.signal
    return outcome


def _fits(run: Run, running: list[Run], room: Room) -> bool:
    """Whether there is room for one more; there always is for a single one."""
    together = sum(need(other) for other in [*running, run])
    return not running or (len(running) < room.jobs and together <= room.memory)


class Stop:
    """The signal that stops the sweep, once there was one; a second SIGINT kills its runs."""

    def __enter__(self) -> Stop:
        self.signal: int | None = None
        self._news: list[int] = []
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def news(self) -> list[int]:
        """Signals that the runs are to be sent now."""
        signals, self._news = self._news, []
        return signals

    def _receive(self, number: int, frame) -> None:
        self._news.append(signal.SIGKILL if self.signal and number == signal.SIGINT else signal.SIGTERM)
        self.signal = self.signal or number
