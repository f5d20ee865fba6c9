"""`sgtm` as a child that ends with its parent: `python -m sgtm.commands.sweep_child PARENT_PID train ...`.

A sweep that is killed cannot stop its runs. On Linux the kernel then sends them SIGTERM, and they save a checkpoint.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Have SIGTERM sent to this process when `parent` ends; exit at once where it has ended already. Linux only."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    sys.argv = ["sgtm", *sys.argv[2:]]

    from sgtm.commands.main import run

    sys.exit(run())
