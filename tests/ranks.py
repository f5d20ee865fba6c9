"""Run a function on several ranks, each a process of its own, and get back what each returns.

For tests of what only happens between processes. The ranks meet through a file, not a port, so that parallel test runs
cannot collide. Those of a test process that has died end too.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from waiting import PATIENCE
from warm import Popen

PR_SET_PDEATHSIG = 1


def run_ranks(
    function: Callable, world_size: int, *args: Any, timeout: float = PATIENCE, env: dict[str, str] | None = None
) -> list[Any]:
    """Results of `function(*args)` on every rank, in order; a gloo process group is up when it is called.

    function  defined at the top level of a file; arguments and results must pickle
    timeout   seconds for all ranks together
    env       environment variables besides this process's
    Raises AssertionError with the end of every rank's output if one fails or the time is up.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        path = [str(Path(entry).resolve()) for entry in sys.path if entry]
        (work / "client").write_bytes(pickle.dumps((os.getpid(), path)))
        (work / "task").write_bytes(pickle.dumps((_file_of(function), function.__name__, args)))
        failure = _run(work, world_size, timeout, env or {})
        if failure:
            logs = {rank: work / f"log{rank}" for rank in range(world_size)}
            ends = [f"--- rank {rank}\n{log.read_text()[-4000:]}" for rank, log in logs.items() if log.exists()]
            raise AssertionError("\n".join([f"{function.__name__}: {failure}", *ends]))
        return [pickle.loads((work / f"result{rank}").read_bytes()) for rank in range(world_size)]


def _file_of(function: Callable) -> str:
    """The file a function is defined in: a rank finds it there, whatever name its module was imported under."""
    return os.path.abspath(function.__code__.co_filename)


def _run(work: Path, world_size: int, timeout: float, env: dict[str, str]) -> str:
    """Why the ranks failed, or nothing; returns at the first that fails, as the others would wait for it for ever."""
    deadline = time.monotonic() + timeout
    with ExitStack() as ending:
        running = {}
        for rank in range(world_size):
            running[rank] = ending.enter_context(_start(work, rank, world_size, env))
            ending.callback(running[rank].kill)
        while running:
            for rank, process in list(running.items()):
                if process.poll() is not None:
                    del running[rank]
                    if process.returncode:
                        return f"rank {rank} ended with status {process.returncode}"
            if time.monotonic() > deadline:
                return f"ranks {sorted(running)} still ran after {timeout} s"
            time.sleep(0.02)
    return ""


def _start(work: Path, rank: int, world_size: int, env: dict[str, str]) -> Popen:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "OMP_NUM_THREADS": 1}
    environ = {**os.environ, **env, **{name: str(value) for name, value in own.items()}}
    command = [sys.executable, __file__, str(work)]
    with open(work / f"log{rank}", "wb") as log:
        return Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def take_part(folder: Path) -> None:
    """Do what one rank has to."""
    client, path = pickle.loads((folder / "client").read_bytes())
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != client:
        sys.exit("the test's process has ended")
    sys.path[:] = path  # where the arguments' classes are, too
    file, name, args = pickle.loads((folder / "task").read_bytes())

    import torch.distributed as dist

    from sgtm.distributed.process_group import end_rank

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = getattr(module, name)(*args)
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    end_rank(0)


if __name__ == "__main__":
    take_part(Path(sys.argv[1]))
