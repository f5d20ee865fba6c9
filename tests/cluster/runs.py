"""The run of these tests: two ranks, one on each host."""

from __future__ import annotations

import signal
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from cluster.hosts import NODES, ROOT, Hosts, Process
from same_run import assert_same_run, wait_for_step

__all__ = [
    "arguments",
    "assert_same_run",
    "finish_with_torchrun",
    "ranks",
    "suspended",
    "torchrun",
    "wait_for_step",
]

STEPS = 40
OPTIONS = {
    "train.steps": STEPS,
    "train.checkpoint_every": 5,
    "train.tokens_per_step": 1024,
    "train.eval_every": 6,
    "distributed.zero_stage": 2,
}
# A host's own name is 127.0.1.1 to itself: without this gloo would offer that address to the other host.
NETWORK = {"GLOO_SOCKET_IFNAME": "eth0"}


def arguments(runs: Path, name: str, *extra: str) -> list[str]:
    """Of `sgtm train`, and of every script that passes them on."""
    options = [f"--{key}={value}" for key, value in OPTIONS.items()]
    return ["debug", f"--runs={runs}", f"--name={name}", *options, *extra]


def torchrun(hosts: Hosts, runs: Path, name: str, *extra: str, **variables: str) -> list[Process]:
    """launch/torchrun.sh on both hosts."""
    environment = {"NNODES": "2", "RDZV": "node-0:29400", "JOB": name, **NETWORK, **variables}
    script = ROOT / "launch" / "torchrun.sh"
    return [
        hosts.start(node, script, *arguments(runs, name, *extra), log=f"torchrun-{name}.{node}", **environment)
        for node in NODES
    ]


def finish_with_torchrun(hosts: Hosts, runs: Path, name: str, *extra: str) -> str:
    """What both hosts print about a run that they finish."""
    return "".join([process.end(240) for process in torchrun(hosts, runs, name, *extra)])


def ranks(hosts: Hosts, run: Path) -> list[psutil.Process]:
    """The ranks of the run: `python -u -m sgtm ...`, and not what has `-m sgtm` among the options of a launcher."""
    of_run = [process for process in hosts.processes() if f"--name={run.name}" in (process.info["cmdline"] or ())]
    return [process for process in of_run if "sgtm" in process.info["cmdline"][2:4]]


@contextmanager
def suspended(hosts: Hosts, run: Path, step: int):
    """The ranks stand still once the run has logged the step, so that nothing comes too late; then they go on."""
    wait_for_step(run, step)
    stopped = ranks(hosts, run)
    assert len(stopped) == 2, stopped
    for process in stopped:
        process.suspend()
    yield
    for process in stopped:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)
