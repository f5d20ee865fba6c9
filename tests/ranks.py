"""Run a function on several ranks, each a process of its own, and get back what each returns.

For tests of what only happens between processes. Ranks are forked by a server that has imported torch, DeepSpeed and
this project once; there is one for each process that runs tests. The ranks meet through a file, not a port, so that
parallel test runs cannot collide. A server whose test process has died kills its ranks and ends.

    client  -> server   a pickled Request on its standard input
    server  -> client   a pickled str on its standard output: empty, or why the ranks failed
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waiting import PATIENCE

PRELOADED = (  # what a run imports, and what DeepSpeed and torch import in its first step
    "transformers",
    "triton",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.zero.stage3",
    "sgtm.training.loop",
)
_server: subprocess.Popen | None = None


@dataclass(frozen=True)
class Request:
    folder: str
    world_size: int
    timeout: float  # seconds
    environ: dict[str, str]
    path: list[str]  # sys.path


def run_ranks(
    function: Callable, world_size: int, *args: Any, timeout: float = PATIENCE, env: dict[str, str] | None = None
) -> list[Any]:
    """Results of `function(*args)` on every rank, in order; a gloo process group is up when it is called.

    function  defined at the top level of a file; arguments and results must pickle
    timeout   seconds for all ranks together
    env       environment variables besides this process's; what is read during an import is read too late
    Raises AssertionError with the end of every rank's output if one fails or the time is up.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "task").write_bytes(pickle.dumps((_file_of(function), function.__name__, args)))
        path = [str(Path(entry).resolve()) for entry in sys.path if entry]
        failure = _ask(Request(folder, world_size, timeout, {**os.environ, **(env or {})}, path))
        if failure:
            logs = {rank: work / f"log{rank}" for rank in range(world_size)}
            ends = [f"--- rank {rank}\n{log.read_text()[-4000:]}" for rank, log in logs.items() if log.exists()]
            raise AssertionError("\n".join([f"{function.__name__}: {failure}", *ends]))
        return [pickle.loads((work / f"result{rank}").read_bytes()) for rank in range(world_size)]


def _file_of(function: Callable) -> str:
    """The file a function is defined in: a rank finds it there, whatever name its module was imported under."""
    return os.path.abspath(function.__code__.co_filename)


def _ask(request: Request) -> str:
    """What the server answers. One that was interrupted is given up, and its ranks with it."""
    global _server
    if _server is None or _server.poll() is not None:
        _server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert _server.stdin and _server.stdout
    try:
        pickle.dump(request, _server.stdin)
        _server.stdin.flush()
        return pickle.load(_server.stdout)
    except BaseException:
        _server.stdin.close()
        _server.wait()
        _server = None
        raise


def serve() -> None:
    """Fork ranks until standard input ends."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is imported lives on: a rank's garbage collector need not go through it
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else writes among the answers
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(_run(request, requests.fileno()), answers)
        answers.flush()


def _run(request: Request, requests: int) -> str:
    """Why the ranks failed, or nothing; returns at the first that fails, as the others would wait for it for ever."""
    running = {_fork(request, rank): rank for rank in range(request.world_size)}
    deadline = time.monotonic() + request.timeout
    try:
        while running:
            for pid, rank in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    del running[pid]
                    if code := os.waitstatus_to_exitcode(status):
                        return f"rank {rank} ended with status {code}"
            if time.monotonic() > deadline:
                return f"ranks {sorted(running.values())} still ran after {request.timeout} s"
            if select.select([requests], [], [], 0.02)[0]:  # the client sends nothing here: it has closed its end
                return "given up"
        return ""
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _fork(request: Request, rank: int) -> int:
    """The process id of a rank. The rank itself raises SystemExit, and with it ends as an interpreter does."""
    if pid := os.fork():
        return pid
    log = os.open(f"{request.folder}/log{rank}", os.O_CREAT | os.O_WRONLY)
    for standard in (1, 2):
        os.dup2(log, standard)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request.world_size, "OMP_NUM_THREADS": 1}
    os.environ.update(request.environ | {name: str(value) for name, value in own.items()})
    sys.path[:] = request.path
    _take_part(request, rank)
    sys.exit()


def _take_part(request: Request, rank: int) -> None:
    import torch.distributed as dist

    from sgtm.distributed.process_group import end_rank

    folder = Path(request.folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=request.world_size)
    file, name, args = pickle.loads((folder / "task").read_bytes())
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = getattr(module, name)(*args)
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    end_rank(0)


if __name__ == "__main__":
    from ranks import serve  # so that requests unpickle as ranks.Request

    serve()
