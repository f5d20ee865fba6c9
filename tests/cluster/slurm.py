"""SLURM on the two hosts: munged, slurmctld on node-0, slurmd on both, as root and apart from the machine."""

from __future__ import annotations

import secrets
from pathlib import Path

from cluster.hosts import NODES, Hosts, Process, until

# cred_expire is also how long a requeued job waits before it may start again.
CONF = """
ClusterName=sgtm
SlurmctldHost=node-0(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0,sched_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


class Slurm:
    """Started where it is made; ends with the hosts."""

    def __init__(self, hosts: Hosts, folder: Path):
        self.hosts, self.folder = hosts, folder
        nodes = [f"NodeName={node} NodeAddr={address} CPUs=2" for node, address in NODES.items()]
        self.conf = folder / "slurm.conf"
        self.conf.write_text(CONF.format(folder=folder, nodes="\n".join(nodes)))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # looks for none that it does not use
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        run = Path("/run/munge")
        hosts.run("node-0", "mkdir", "-m", "755", run)
        munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--seed-file={run}/seed"]
        self._start("node-0", *munged, f"--pid-file={run}/pid", f"--socket={run}/munge.socket.2")
        self._start("node-0", "slurmctld", "-D")
        for node in NODES:
            self._start(node, "slurmd", "-D", "-N", node)
        until(lambda: self.ask("sinfo", "--noheader", "--format=%T") == "idle", "SLURM's idle nodes")

    def _start(self, node: str, *command: str | Path) -> Process:
        log = f"{Path(command[0]).name}.{node}.out"
        return self.hosts.start(node, *command, log=str(self.folder / log), SLURM_CONF=str(self.conf))

    def ask(self, *command: str | Path, **variables: str) -> str:
        """What one of SLURM's commands prints on node-0."""
        return self.hosts.run("node-0", *command, SLURM_CONF=str(self.conf), **variables).strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of the job: JobState, Restarts, ExitCode, ..."""
        words = self.ask("scontrol", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words)
