"""Two hosts on one machine: namespaces of their own for network, processes, mounts and names, gone with their owner.

node-0 and node-1 are network namespaces joined by a veth pair (10.77.0.1 and 10.77.0.2 on `eth0`). Each knows itself as
Debian's installer writes it, `127.0.1.1 node-0`, and the other by its address. They share the file system and the
processes, and nothing with the machine: /run is empty, no port and no daemon of the machine can be met.

Everything in them ends with the first process of their process namespace, and that with the process that made it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from bare import python_path

ROOT = Path(__file__).parents[2]
NODES = {"node-0": "10.77.0.1", "node-1": "10.77.0.2"}
APART = ["unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
# Waits, and as the first process reaps what daemons leave behind.
FIRST = "mount -t tmpfs -o mode=755 tmpfs /run && mkdir /run/netns && : > /run/ready; sleep infinity & wait"


def missing_rights() -> str:
    """Why this process cannot make hosts; empty if it can."""
    if os.geteuid() != 0:
        return "needs root: it makes namespaces and starts daemons"
    done = subprocess.run([*APART, "ip", "netns", "list"], capture_output=True, text=True)
    return f"needs CAP_SYS_ADMIN and CAP_NET_ADMIN: {done.stderr.strip()}" if done.returncode else ""


class Hosts:
    """Makes the hosts; `close` ends all that was started on them."""

    def __init__(self, folder: Path):
        self.folder = folder
        command = ["setpriv", "--pdeathsig", "KILL", *APART, "bash", "-c", FIRST]
        self._owner = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            children = psutil.Process(self._owner.pid).children
            until(children, "the hosts' first process")
            self.first = children()[0].pid
            until(Path(f"/proc/{self.first}/root/run/ready").exists, "the hosts' /run")
            for node in NODES:
                others = [f"{ip} {name}" for name, ip in NODES.items() if name != node]
                known = "\n".join(["127.0.0.1 localhost", f"127.0.1.1 {node}", *others, ""])
                (folder / f"hosts.{node}").write_text(known)
                self._in("ip", "netns", "add", node)
            self._in("ip", "link", "add", "eth0", "netns", "node-0", "type", "veth", "peer", "eth0", "netns", "node-1")
            for node, address in NODES.items():
                self._in("ip", "-n", node, "addr", "add", f"{address}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    self.link(node, "up", device)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all processes; the namespaces go with the last of them."""
        self._owner.kill()
        self._owner.wait()

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _enter(self) -> list[str]:
        return ["nsenter", "--target", str(self.first), "--mount", "--pid", "--net", "--uts", "--ipc", "--"]

    def _in(self, *command: str) -> None:
        subprocess.run([*self._enter(), *command], check=True, stdin=subprocess.DEVNULL)

    def processes(self) -> list[psutil.Process]:
        """All that run on the hosts."""

        def space(pid: int) -> str:
            with suppress(OSError):
                return os.readlink(f"/proc/{pid}/ns/pid")
            return ""

        own = space(self.first)
        return [one for one in psutil.process_iter(["cmdline", "ppid"]) if space(one.pid) == own]

    def link(self, node: str, state: str, device: str = "eth0") -> None:
        """Plug the node's network in or out: `up` or `down`."""
        self._in("ip", "-n", node, "link", "set", device, state)

    def command(self, node: str, *command: str | Path) -> list[str]:
        """What runs `command` on the node, in the repository."""
        script = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        hosts = str(self.folder / f"hosts.{node}")
        apart = ["nsenter", f"--net=/run/netns/{node}", "unshare", "--uts", "--mount", f"--wd={ROOT}"]
        return [*self._enter(), *apart, "sh", "-c", script, node, hosts, *map(str, command)]

    def run(self, node: str, *command: str | Path, **variables: str) -> str:
        """What the command prints to stdout; AssertionError with all that it printed where it fails."""
        done = subprocess.run(
            self.command(node, *command), env=environment(**variables), capture_output=True, text=True, timeout=120,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, node: str, *command: str | Path, log: str, **variables: str) -> Process:
        """Start the command on the node, its output in the file `log` of the folder."""
        return Process(self.command(node, *command), self.folder / log, environment(**variables))


class Process:
    """A process on a node, and what it prints."""

    def __init__(self, command: list[str], log: Path, variables: dict[str, str]):
        self.log = log
        with log.open("w") as file:
            self._entered = subprocess.Popen(
                command, env=variables, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )

    @property
    def output(self) -> str:
        return self.log.read_text("utf-8", "replace")

    @property
    def running(self) -> bool:
        return self._entered.poll() is None

    def send_signal(self, number: signal.Signals) -> None:
        """To the process itself: nsenter keeps what it gets."""
        with suppress(psutil.NoSuchProcess):
            psutil.Process(self._entered.pid).children()[0].send_signal(number)

    def wait(self, seconds: float) -> int:
        """Exit status; AssertionError with the output where it does not end in time."""
        try:
            return self._entered.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:.0f} s: {self.output}") from None

    def end(self, seconds: float) -> str:
        """The output, once it has ended with status 0."""
        assert self.wait(seconds) == 0, self.output
        return self.output


def environment(**variables: str) -> dict[str, str]:
    """This process's variables, with the Python of the tests first in PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/sbin", "/sbin", os.environ["PATH"]])
    code = {"PYTHONPATH": python_path(ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH", ""))}
    return {**os.environ, **code, "PATH": path, "VIRTUAL_ENV": sys.prefix, **variables}


def until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait for the condition; AssertionError that says for what."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not in {seconds:.0f} s")
        time.sleep(0.05)
