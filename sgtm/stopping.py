"""Commands that end within seconds of a signal, with a status and a line that show it; nothing heavy is imported."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ENDED_EARLY = (0, *(128 + number for number in SIGNALS))
"""Statuses of a training that has saved and ended before its last step; 0 under a launcher."""
GRACE = 10.0
"""Seconds that a command has to clean up after a signal."""


class Stopped(KeyboardInterrupt):
    """A signal has ended a command early; what it had finished is kept. status: its exit status, 128 + the signal."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


@contextmanager
def stoppable(go_on: str) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and Ctrl-C in the block print how to go on and raise `Stopped`; the process ends after `GRACE`
    where that does not get through, as while a thread reads a large file.

    go_on  such as `again: sgtm eval runs/mine`
    """

    late: list[threading.Timer] = []

    def stop(number: int, frame) -> None:
        for other in SIGNALS:  # a scheduler repeats itself
            signal.signal(other, signal.SIG_DFL if other == signal.SIGINT else signal.SIG_IGN)
        # Not by print, which may be what was interrupted.
        os.write(2, f"stopped by {signal.Signals(number).name}; {go_on}\n".encode())
        late.append(threading.Timer(GRACE, os._exit, [128 + number]))
        late[0].daemon = True
        late[0].start()
        raise Stopped(number)

    previous = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for timer in late:
            timer.cancel()
        for number, handler in previous.items():
            signal.signal(number, handler)
