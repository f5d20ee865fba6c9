"""Two hosts for a session, the run that every launcher must repeat, and what a machine lacks for that."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import warm
from cluster.hosts import Hosts, environment, missing_rights
from cluster.runs import finish_with_torchrun

os.environ[warm.COLD] = "1"  # every process of a host is a new interpreter

PACKAGES = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "munged": "munge",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
    "pdsh": "pdsh",
}


def require(*commands: str) -> None:
    """Skip, with the names of the Debian packages, where one of the commands is not there."""
    path = environment()["PATH"]
    lacking = sorted({PACKAGES[command] for command in commands if not shutil.which(command, path=path)})
    if lacking:
        pytest.skip(f"not installed: {' '.join(lacking)} (apt-get install {' '.join(lacking)})")


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    require("ip", "nsenter", "setpriv")
    if reason := missing_rights():
        pytest.skip(reason)
    with Hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(scope="session")
def uninterrupted(hosts: Hosts, tmp_path_factory) -> Path:
    """The run directory of a run on both hosts that nothing has happened to."""
    runs = tmp_path_factory.mktemp("runs")
    finish_with_torchrun(hosts, runs, "whole")
    return runs / "whole"
