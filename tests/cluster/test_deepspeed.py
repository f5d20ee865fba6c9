"""launch/deepspeed.sh with a hostfile: pdsh and ssh to two hosts, each with an sshd that knows the test's key alone.

`test_a_run_over_ssh` fails if launch/deepspeed.sh does not pass the environment on to the hosts: gloo then takes
127.0.1.1, and the ranks never meet.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from cluster.conftest import require
from cluster.hosts import NODES, ROOT, Hosts, Process, environment, until
from cluster.runs import NETWORK, arguments, assert_same_run, ranks, suspended

SSHD = """
Port 2222
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PidFile none
"""
SSH = """
Host node-*
    Port 2222
    User root
    IdentityFile {folder}/user
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking no
    LogLevel ERROR
"""


@pytest.fixture(scope="module")
def ssh(hosts: Hosts, tmp_path_factory) -> Path:
    """A folder with `ssh` as DeepSpeed and pdsh find it: the real one, with settings of this test."""
    require("ssh", "sshd", "pdsh")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    (folder / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {folder}/ssh_config "$@"\n')
    (folder / "ssh").chmod(0o755)
    hosts.run("node-0", "mkdir", "-p", "/run/sshd")
    for node in NODES:
        hosts.start(node, "/usr/sbin/sshd", "-D", "-e", "-f", folder / "sshd_config", log=str(folder / f"sshd.{node}"))
    for node in NODES:
        until(lambda node=node: answers(hosts, folder, node), f"sshd of {node}", 20)
    return folder


def answers(hosts: Hosts, folder: Path, node: str) -> bool:
    command = hosts.command("node-0", folder / "ssh", node, "hostname")
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.stdout == f"{node}\n"


def deepspeed(hosts: Hosts, ssh: Path, runs: Path, name: str, *extra: str) -> Process:
    """launch/deepspeed.sh on node-0, for both."""
    hostfile = runs / "hostfile"
    hostfile.write_text("".join(f"{node} slots=1\n" for node in NODES))
    path = os.pathsep.join([str(ssh), environment()["PATH"]])
    return hosts.start(
        "node-0", "env", f"PATH={path}", ROOT / "launch" / "deepspeed.sh", *arguments(runs, name, *extra),
        log=str(runs / f"{name}.log"), HOSTFILE=str(hostfile), **NETWORK,
    )  # fmt: skip


def test_a_run_over_ssh(hosts: Hosts, ssh: Path, uninterrupted: Path, tmp_path: Path):
    printed = deepspeed(hosts, ssh, tmp_path, "over-ssh").end(240)
    assert "node-1: " in printed, "printed by pdsh: " + printed
    assert_same_run(tmp_path / "over-ssh", uninterrupted)


def test_sigterm_to_the_launcher(hosts: Hosts, ssh: Path, uninterrupted: Path, tmp_path: Path):
    """It ends the ranks of both hosts, which save first although nobody reads any more what they print."""
    launcher = deepspeed(hosts, ssh, tmp_path, "stopped")
    with suspended(hosts, tmp_path / "stopped", 8):
        launcher.send_signal(signal.SIGTERM)
    launcher.wait(60)
    until(lambda: not ranks(hosts, tmp_path / "stopped"), "the end of the ranks")
    assert (tmp_path / "stopped" / "checkpoints").exists()
    printed = deepspeed(hosts, ssh, tmp_path, "stopped", "--resume").end(240)
    assert "resumed after step" in printed
    assert_same_run(tmp_path / "stopped", uninterrupted)


def test_a_mistake_reaches_the_caller(hosts: Hosts, ssh: Path, tmp_path: Path):
    launcher = deepspeed(hosts, ssh, tmp_path, "mistaken", "--train.micro_batch=3")
    assert launcher.wait(120) != 0
    assert "micro_batch" in launcher.output
