"""Ranks that add up a number in each step as a run does, one of which breaks: python lost_ranks.py HOW RANK [OTHERS].

OTHERS: what the other ranks do then. With APART=1 in the environment each rank is on a machine of its own. STEP in the
environment: the step, counted from 1, in which the rank breaks.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from sgtm.commands import main
from sgtm.commands.main import run
from sgtm.config import load_config
from sgtm.distributed import watchdog
from sgtm.distributed.process_group import init_distributed
from sgtm.distributed.watchdog import enter

STEP = int(os.environ.get("STEP", "40"))


def hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(600)


def suspend() -> None:
    """Until it is woken, in a place that it was in for some beats and stays in for half of its limit of 6 s."""
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(3)


def raise_error(error: Exception) -> None:
    raise error


BREAK = {
    "raise": lambda: raise_error(RuntimeError("a bug of this rank")),
    "refuse": lambda: raise_error(OSError("the disk of this rank is full")),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
    "crash": lambda: ctypes.string_at(0),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "suspend": suspend,
    "sleep": lambda: time.sleep(600),
    "hold": hold_the_interpreter,
    "finish": lambda: None,
}


def train(options) -> int:
    signal.signal(signal.SIGTERM, lambda *args: None)  # as StopSignal does in a run
    minutes = 2 if os.environ.get("APART") else 0.1 if "suspend" in sys.argv else 0.05
    config = load_config("debug", [f"--distributed.timeout_minutes={minutes}"])
    rank_info = init_distributed(config.distributed, config.kernels)
    if "suspend" in sys.argv:
        watchdog.BEAT, watchdog.LISTEN = 0.1, 1.0
    for step in range(1, STEP + 3):
        enter("forward", step)
        if step == STEP and rank_info.rank == int(sys.argv[2]):
            BREAK[sys.argv[1]]()
        elif step == STEP and len(sys.argv) > 3:
            BREAK[sys.argv[3]]()
        enter("backward")
        dist.all_reduce(torch.ones(1))
        time.sleep(0.05)
    enter(None)
    time.sleep(2 if rank_info.rank == 1 else 0)  # some end later
    return 0


if __name__ == "__main__":
    if os.environ.get("APART"):
        watchdog._machine = lambda: str(os.getpid())
    main._dispatch = train
    sys.exit(run())
