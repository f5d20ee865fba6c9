"""Python processes of tests, forked from one that has imported torch, DeepSpeed and this project.

Four of five seconds of a short run are imports. conftest.py puts `Popen` in the place of `subprocess.Popen`: a command
`python -m sgtm ...`, `python script.py ...`, `sgtm ...` or `torchrun ...` then continues as a fork of a server, which
has the imports behind it, and what such a process starts does so too. The process is a child of the one that started
it, as any other is: its parent becomes a subreaper for the moment in which the server forks twice.

A command is started as usual, by a new interpreter, where a fork would be something else: `python -c`, options of the
interpreter, `preexec_fn`, another environment of the imports (`IMPORTED`), another copy of this project, a test marked
`cold`, a system other than Linux.

    client  -> server   a pickled Request with three file descriptors, on a socket
    server  -> client   the process id
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import inspect
import os
import pickle
import runpy
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = str(Path(__file__).resolve().parents[1])
PRELOADED = (  # what a run imports, and what DeepSpeed and torch import in its first step
    "transformers",
    "triton",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.run",
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.zero.stage3",
    "sgtm.training.loop",
)
IMPORTED = ("PYTHON", "OMP_", "DS_", "TORCHDYNAMO_", "TRITON_INTERPRET", "HF_HUB_OFFLINE", "LD_")  # read by the imports
COLD = "SGTM_TESTS_COLD"  # in the environment: every process is a new interpreter
PR_SET_CHILD_SUBREAPER = 36
_Cold = subprocess.Popen
_socket: socket.socket | None = None  # to the server of this process
_server: subprocess.Popen | None = None  # which it has not forked itself
_environ = dict(os.environ)  # the server's


@dataclass(frozen=True)
class Request:
    """What a process continues as: `words` begin with `-m` and a module, or with a script."""

    words: list[str]
    line_buffered: bool
    environ: dict[str, str]
    folder: str
    new_session: bool
    process_group: int
    cores: set[int]


class Popen(_Cold):
    """`subprocess.Popen`, whose commands of this project's interpreter are forks."""

    def _execute_child(self, *values):
        call = inspect.signature(super()._execute_child).bind(*values).arguments
        request = _request(call)
        if request is None:
            super()._execute_child(*values)
            return
        ends = [call[name] if call[name] != -1 else fd for fd, name in enumerate(("p2cread", "c2pwrite", "errwrite"))]
        self.pid = _start(request, ends)
        self._child_created = True
        self._close_pipe_fds(*(call[n] for n in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")))


def _request(call: dict) -> Request | None:
    """None for what is no command of this project's interpreter, or would be another as a fork."""
    environ = dict(os.environ if call["env"] is None else call["env"])
    if not enabled() or call["shell"] or call["preexec_fn"] or call["pass_fds"] or call["umask"] != -1:
        return None
    words = _python_words(call["args"], call["executable"], environ)
    folder = os.fspath(call["cwd"] or os.getcwd())
    if words is None or (os.path.isdir(f"{folder}/sgtm") and os.path.realpath(folder) != ROOT):
        return None
    read = [name for name in {*environ, *_environ} if name.startswith(IMPORTED)]
    if any(environ.get(name) != _environ.get(name) for name in read):
        return None
    buffered = words[0] == "-u"
    return Request(
        words[buffered:],
        buffered,
        environ,
        folder,
        bool(call["start_new_session"]),
        call.get("process_group", -1),
        os.sched_getaffinity(0),
    )


def _python_words(arguments, executable, environ: dict[str, str]) -> list[str] | None:
    """The command without the interpreter, where it is one of a module or a script."""
    if executable is not None or isinstance(arguments, (str, bytes, os.PathLike)):
        return None
    words = [os.fsdecode(word) for word in arguments]
    if words[0] != sys.executable:
        script = shutil.which(words[0], path=environ.get("PATH"))
        if script is None or os.path.dirname(script) != os.path.dirname(sys.executable) or not _is_python(script):
            return None
        return [script, *words[1:]]
    option = words[1 + (words[1:2] == ["-u"]) :]
    return words[1:] if option[:1] == ["-m"] or (option and option[0].endswith(".py")) else None


def _is_python(script: str) -> bool:
    with open(script, "rb") as file:
        return file.readline().startswith(b"#!") and b"import" in file.read(200)


def install() -> None:
    """From now on every `subprocess.Popen` is this one, and a fork has the imports of this environment."""
    _environ.clear()
    _environ.update(os.environ)
    subprocess.Popen = Popen


def enabled() -> bool:
    return sys.platform == "linux" and COLD not in os.environ


def _start(request: Request, ends: list[int]) -> int:
    """Process id of a new child of this process that continues as `request`."""
    global _socket
    if _socket is None:
        _start_server()
    assert _socket is not None
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        socket.send_fds(_socket, [pickle.dumps(request)], ends)
        return int(_socket.recv(100))
    except BaseException:  # an answer that is still to come is not the next one's
        _socket.close()
        _socket = None
        raise
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _start_server() -> None:
    global _socket, _server
    _socket, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, str(its.fileno())]
    _server = _Cold(command, env=_environ, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL)
    its.close()


def _serve(requests: socket.socket) -> None:
    """Fork until the client has ended. Returns in the client's process alone, never in one that was forked."""
    while True:
        message, ends, *_ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            return
        pid = _fork_twice(pickle.loads(message), ends, requests)
        for end in ends:
            os.close(end)
        requests.send(str(pid).encode())


def _fork_twice(request: Request, ends: list[int], requests: socket.socket) -> int:
    """Process id of a new child of the client, which waits until the process between them has ended."""
    (pid_out, pid_in), (ended_out, ended_in) = os.pipe(), os.pipe()
    between = os.fork()
    if between == 0:
        pid = os.fork()
        if pid:
            os.write(pid_in, str(pid).encode())
            os._exit(0)
        for end in (requests.detach(), pid_out, pid_in, ended_in):
            os.close(end)
        with open(ended_out, "rb") as ended:
            ended.read()
        _continue_as(request, ends)
    os.waitpid(between, 0)
    for end in (ended_out, ended_in, pid_in):
        os.close(end)
    with open(pid_out) as file:
        return int(file.read())


def _continue_as(request: Request, ends: list[int]) -> NoReturn:
    for standard, end in enumerate(ends):
        os.dup2(end, standard)
    for end in ends:
        os.close(end)
    if request.new_session:
        os.setsid()
    if request.process_group >= 0:
        os.setpgid(0, request.process_group)
    os.sched_setaffinity(0, request.cores)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environ)
    sys.stdout.reconfigure(line_buffering=request.line_buffered)
    if _starts_others(request.words):
        _fork_server()
    else:
        os.environ[COLD] = "1"
    if request.words[0] == "-m":
        module, sys.argv = request.words[1], request.words[1:]
        sys.path[0] = request.folder
        sys.modules.pop(module, None)  # it runs now, whoever has imported it
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        script, sys.argv = request.words[0], request.words
        sys.path[0] = os.path.dirname(os.path.abspath(script))
        runpy.run_path(script, run_name="__main__")
    sys.exit()


def _starts_others(words: list[str]) -> bool:
    """Not so a rank of ranks.py, nor a command but two; to fork a server for it takes a fifth of a second."""
    name, *arguments = words[1:] if words[0] == "-m" else [os.path.basename(words[0]), *words[1:]]
    return name != "ranks.py" and (name != "sgtm" or arguments[:1] in (["sweep"], ["launch"]))


def _fork_server() -> None:
    """The server of this process, forked while it is new: later it has threads."""
    global _socket
    _socket, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        its.close()
        return
    _socket.close()
    _socket = None
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)  # who reads the process's output reads to its end, not to the server's
    _serve(its)
    os._exit(0)


def main() -> None:
    import shared_corpus

    requests = socket.socket(fileno=int(sys.argv[1]))
    for name in PRELOADED:
        importlib.import_module(name)
    shared_corpus.install()
    gc.collect()
    gc.freeze()  # what is imported lives on: a fork's garbage collector need not go through it
    _serve(requests)


if __name__ == "__main__":
    import warm  # so that requests unpickle as warm.Request

    warm.install()
    warm.main()
