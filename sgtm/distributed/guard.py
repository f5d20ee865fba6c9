"""A process beside each rank that ends it where C code that never returns holds its interpreter.

No thread of the rank can do that, and a timer of the system runs on while the job is suspended, so that it would end
the rank as it is woken. This process is suspended with the job, counts only the time in which it runs itself, and none
while the rank is stopped. It needs the standard library alone and is run as a file: python guard.py RANK_PID SECONDS
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

BEAT = 1.0  # seconds


class Guard:
    """The guard of this process, for as long as it lives. limit: seconds between two beats."""

    def __init__(self, limit: float):
        command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(limit)]
        # In a session of its own: Ctrl-C and the signals of a launcher are for the rank.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )
        assert self.process.stdin is not None  # it is a pipe
        self.pipe = self.process.stdin
        os.set_blocking(self.pipe.fileno(), False)

    def beat(self) -> None:
        with suppress(OSError, ValueError):  # it does not read, has been killed, or is left
            os.write(self.pipe.fileno(), b".")

    def leave(self) -> None:
        """It ends; the rank may hold its interpreter now."""
        self.pipe.close()
        with suppress(subprocess.TimeoutExpired):  # it is stopped
            self.process.wait(BEAT)


class Silence:
    """Seconds without a beat in which both processes ran: of a gap, in which this one did not, 5 beats count."""

    def __init__(self, now: float):
        self.seconds, self.last = 0.0, now

    def add(self, now: float, heard: bool, stopped: bool) -> float:
        passed, self.last = min(now - self.last, 5 * BEAT), now
        self.seconds = 0.0 if heard else self.seconds + passed * (not stopped)
        return self.seconds


def guard(rank: int, limit: float) -> None:
    """Ends with the rank, or ends it by SIGABRT, for which `faulthandler` shows its stack."""
    silence = Silence(time.monotonic())
    while os.getppid() == rank:
        heard = bool(select.select([0], [], [], BEAT)[0])
        if heard and not os.read(0, 65536):
            return
        if silence.add(time.monotonic(), heard, _is_stopped(rank)) > limit:
            text = (
                f"error: process {rank} has not run Python for {limit / 60:.1f} minutes, and is ended; it was here:\n"
            )
            os.write(2, text.encode())
            os.kill(rank, signal.SIGABRT)
            return


def _is_stopped(pid: int) -> bool:
    """By SIGSTOP, or by a debugger."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in b"Tt"
    except OSError:  # another system, or it has ended
        return False


if __name__ == "__main__":
    guard(int(sys.argv[1]), float(sys.argv[2]))
