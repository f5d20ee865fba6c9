"""Runs a command, and kills its process group where whoever started this one is gone.

    guard.py COMMAND...     with the read end of a pipe as standard input

The driver kills the group of a stage at its limit; but where the driver itself is killed, nobody would. The pipe's
other end closes with it, and then the whole group, this process included, gets SIGKILL. Exits as the command does, with
128 + N where signal N killed it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main(command: list[str]) -> int:
    threading.Thread(target=_watch, daemon=True).start()
    # The lock of the folder is inherited: it is held until the last process of the stage is gone.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False)
    code = process.wait()
    return code if code >= 0 else 128 - code


def _watch() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
