"""Runs on forked ranks, and the ways in which a campaign breaks them.

The ranks are forked from a process that has imported everything, so that a run takes seconds.
"""

from __future__ import annotations

import ctypes
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sgtm.commands.main import run as sgtm_process
from sgtm.run.checkpoint import finished
from sgtm.training import loop  # noqa: F401 (all that a rank needs is imported before it is forked)

sys.path.append(str(Path(__file__).parents[1]))
from waiting import wait_until

STEPS, EVERY = 24, 3
OPTIONS = [
    f"--train.steps={STEPS}",
    f"--train.checkpoint_every={EVERY}",
    "--train.keep_last=3",
    "--train.eval_every=8",
    "--train.eval_sequences=4",
    "--distributed.timeout_minutes=0.4",
]


@dataclass
class Attempt:
    """One start of a run on forked ranks."""

    ranks: list[int]
    log: Path
    began: float

    def alive(self) -> bool:
        return any(status is None for status in self.statuses())

    def statuses(self) -> list[int | None]:
        """Exit status of each rank, None while it runs; negative: the signal that ended it."""
        for pid in self.ranks:
            if pid not in self._ended:
                child, status = os.waitpid(pid, os.WNOHANG)
                if child:
                    self._ended[pid] = os.waitstatus_to_exitcode(status)
        return [self._ended.get(pid) for pid in self.ranks]

    def wait(self) -> list[int]:
        """Exit statuses of all ranks. Raises AssertionError if they do not end by themselves."""
        try:
            wait_until(lambda: not self.alive(), every=0.005)
        finally:
            self.signal(signal.SIGKILL)
        return self.statuses()

    def signal(self, number: int, ranks: list[int] | None = None) -> None:
        for pid in ranks or self.ranks:
            if pid not in self._ended:
                os.kill(pid, number)

    _ended: dict[int, int] = field(default_factory=dict)


def start(run: Path, stage: int, ranks: int, log: Path, before: Callable[[int], None] = lambda rank: None) -> Attempt:
    """`sgtm train debug --resume auto` on forked ranks; `before(rank)` is called in each."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    command = ["sgtm", "train", "debug", "--resume", "auto", f"--runs={run.parent}", f"--name={run.name}", *OPTIONS]
    command += [f"--distributed.zero_stage={stage}", f"--data.path={run.parents[1] / 'corpus'}"]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                os.write(descriptor, b"ATTEMPT\n" if rank == 0 else b"")
                if ranks > 1:
                    launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                    os.environ.update({name: str(value) for name, value in (launch | address).items()})
                sys.argv = command
                before(rank)
                status = sgtm_process()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        pids.append(pid)
    return Attempt(pids, log, time.monotonic())


def kill_all(attempt: Attempt, _) -> None:
    attempt.signal(signal.SIGKILL)


def kill_one(attempt: Attempt, chance: random.Random) -> None:
    """The others must end by themselves."""
    attempt.signal(signal.SIGKILL, [chance.choice(attempt.ranks)])


def terminate(attempt: Attempt, chance: random.Random) -> None:
    attempt.signal(signal.SIGTERM, chance.choice([attempt.ranks, attempt.ranks[-1:]]))


def stop_one(attempt: Attempt, chance: random.Random) -> None:
    """A rank that hangs: the others end after the timeout, it is killed then."""
    hung = chance.choice(attempt.ranks)
    attempt.signal(signal.SIGSTOP, [hung])
    others = [pid for pid in attempt.ranks if pid != hung]
    try:
        wait_until(
            lambda: all(
                status is not None
                for pid, status in zip(attempt.ranks, attempt.statuses(), strict=True)
                if pid in others
            )
        )
    finally:
        attempt.signal(signal.SIGKILL)


class NoFault(Exception):
    """There was nothing to damage yet."""


def damage(run: Path, chance: random.Random) -> set[str]:
    """Cut short or flip a bit of a file of the newest checkpoint, if another is there to go back to; its name.

    Raises NoFault if none is.
    """
    checkpoints = finished(run)
    if len(checkpoints) < 2:
        raise NoFault
    file = chance.choice(sorted(path for path in checkpoints[0].iterdir()))
    content = bytearray(file.read_bytes())
    if chance.random() < 0.5:
        del content[chance.randrange(len(content)) :]
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    return {checkpoints[0].name}


@dataclass
class Moment:
    """`delay` seconds after the run has logged so many steps; 0: after it is started."""

    metrics: Path
    step: int
    delay: float

    def wait(self, while_: Callable[[], bool] = lambda: True) -> None:
        mark = f'"kind": "step", "step": {self.step},'
        while self.step and while_() and not (self.metrics.exists() and mark in self.metrics.read_text()):
            time.sleep(0.002)
        end = time.monotonic() + self.delay
        while while_() and time.monotonic() < end:
            time.sleep(0.001)


def full_disk(room: int, moment: Moment) -> Callable[[int], None]:
    """From then on no file of any rank may grow beyond `room` bytes: a full disk, without a disk of its own."""

    def fill() -> None:
        moment.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    def before(rank: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        threading.Thread(target=fill, daemon=True).start()

    return before


def cut_network(rank: int, moment: Moment) -> Callable[[int], None]:
    """All connections of this rank are shut down then, for both ends."""

    def cut() -> None:
        moment.wait()
        shutdown = ctypes.CDLL(None).shutdown
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor > 2:
                shutdown(descriptor, socket.SHUT_RDWR)  # fails for what is no socket

    def before(this: int) -> None:
        if this == rank:
            threading.Thread(target=cut, daemon=True).start()

    return before


KILLS = {"SIGKILL": kill_all, "SIGKILL of one rank": kill_one, "SIGTERM": terminate, "a rank hangs": stop_one}
FAULTS = {
    1: ("SIGKILL", "SIGTERM", "damaged checkpoint", "full disk"),
    2: ("SIGKILL", "SIGKILL of one rank", "SIGTERM", "damaged checkpoint", "full disk", "cut network", "a rank hangs"),
}
WEIGHTS = {"a rank hangs": 0.3}  # each waits for the timeout
