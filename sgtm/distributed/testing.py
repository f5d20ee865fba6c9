"""Run a function on several ranks, each a process of its own, and get back what each returns.

For tests of what only happens between processes. A rank costs some five seconds of imports, so a test function does
many checks in one launch. The ranks meet through a file, not a port, so that parallel test runs cannot collide.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_ranks(
    function: Callable, world_size: int, *args: Any, timeout: float = 120, env: dict[str, str] | None = None
) -> list[Any]:
    """Results of `function(*args)` on every rank, in order; a gloo process group is up when it is called.

    function  defined at the top level of a file; arguments and results must pickle
    timeout   seconds for all ranks together
    Raises AssertionError with the end of every rank's output if one fails or the time is up.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        task = (_file_of(function), function.__name__, args)
        (work / "task").write_bytes(pickle.dumps(task))
        logs = [open(work / f"log{rank}", "w+") for rank in range(world_size)]  # noqa: SIM115
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "sgtm.distributed.testing", folder],
                env=_environment(rank, world_size) | (env or {}),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            failed = _wait(ranks, time.monotonic() + timeout)
            if failed:
                tails = [f"--- rank {rank}\n{(work / f'log{rank}').read_text()[-4000:]}" for rank in range(world_size)]
                raise AssertionError(f"{function.__name__}: {failed}\n" + "\n".join(tails))
            return [pickle.loads((work / f"result{rank}").read_bytes()) for rank in range(world_size)]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
            for log in logs:
                log.close()


def _file_of(function: Callable) -> str:
    """The file a function is defined in: a child finds it there, whatever name its module was imported under."""
    return os.path.abspath(function.__code__.co_filename)


def _environment(rank: int, world_size: int) -> dict[str, str]:
    path = [str(Path(entry).resolve()) for entry in sys.path if entry]
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path),
    }


def _wait(ranks: list[subprocess.Popen], deadline: float) -> str:
    """What went wrong, or nothing; returns at the first rank that fails, as the others would wait for it for ever."""
    while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
        if any(process.poll() for process in ranks):
            break
        time.sleep(0.02)
    codes = [process.poll() for process in ranks]
    if any(codes):
        return f"exit codes {codes}"
    return "time is up" if None in codes else ""


def _main(folder: str) -> None:
    import torch.distributed as dist

    from sgtm.distributed.process_group import end_rank

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    file, name, args = pickle.loads(Path(folder, "task").read_bytes())
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    result = getattr(module, name)(*args)
    Path(folder, f"result{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    end_rank(0)


if __name__ == "__main__":
    _main(sys.argv[1])
