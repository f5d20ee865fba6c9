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
    """SIGTERM, SIGUSR1 and Ctrl-C in the block print how to resume and raise `Stopped`.

    Python runs the handler of a signal when the main thread is back from C code, which may take minutes, as the
    training of a tokenizer does. So a thread hears of it too: it prints the line at once, and ends the process after
    `GRACE` seconds if the block is not over by then, because of such code or of a clean-up that waits.

    go_on  such as `again: sgtm eval runs/mine`
    """
    first, over = iter([True]), threading.Event()
    stopped: list[int] = []

    def announce(number: int) -> None:
        if next(first, False):  # of both threads
            # Not by print, which may be what was interrupted.
            os.write(2, f"stopped by {signal.Signals(number).name}; {go_on}\n".encode())

    def stop(number: int, frame) -> None:
        stopped.append(number)
        for other in SIGNALS:  # a scheduler repeats itself
            signal.signal(other, signal.SIG_DFL if other == signal.SIGINT else signal.SIG_IGN)
        announce(number)
        raise Stopped(number)

    def watch() -> None:
        while number := os.read(arrives, 1)[0]:
            if stopped or signal.getsignal(number) is stop:  # else it is for a handler set in the block
                announce(number)
                if not over.wait(GRACE):
                    os._exit(128 + number)
                return

    arrives, written = os.pipe()
    os.set_blocking(written, False)
    thread = threading.Thread(target=watch, name="sgtm-signals", daemon=True)
    before = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    previous = {number: signal.signal(number, stop) for number in SIGNALS}
    thread.start()
    try:
        yield
        if stopped:  # and something has swallowed it, as a destructor does
            raise Stopped(stopped[0])
    finally:
        over.set()
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.write(written, b"\0")  # closing it would not end the reading where a forked process has it too
        thread.join()
        os.close(written)
        os.close(arrives)


os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # signals of a child are not the parent's
