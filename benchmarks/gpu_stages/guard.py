"""Run a command, and kill its process group if the driver that started it dies.

    guard.py COMMAND...     with the read end of a pipe as standard input

The driver kills a stage's group at its limit, but cannot if it is killed itself. The pipe then closes, and the whole
group, this process included, gets SIGKILL. Exits with the command's status, or 128 + N if signal N killed it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main(command: list[str]) -> int:
    threading.Thread(target=_watch, daemon=True).start()
    # The lock of the folder is inherited: it is held until the last process of the stage has ended.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False)
    code = process.wait()
    return code if code >= 0 else 128 - code


def _watch() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
