"""launch/slurm.sbatch under a real SLURM of two nodes: a job that ends early goes on by itself, to the same losses.

`test_requeued_by_the_administrator` fails if a restarted job does not add --resume and keeps --overwrite.
`test_preempted` fails if the script does not read PreemptTime: SLURM signals a preemption with a grace time to the
ranks alone, so that they save and the job would be complete.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster.conftest import require
from cluster.hosts import ROOT, Hosts, until
from cluster.runs import NETWORK, arguments, assert_same_run, suspended
from cluster.slurm import Slurm

STOPPED = "checkpoint saved"
QUEUED = "is queued again"


@pytest.fixture(scope="module")
def slurm(hosts: Hosts, tmp_path_factory) -> Slurm:
    require("munged", "slurmctld", "slurmd", "sbatch")
    return Slurm(hosts, tmp_path_factory.mktemp("slurm"))


class Job:
    """launch/slurm.sbatch with one rank on each node."""

    def __init__(self, slurm: Slurm, runs: Path, name: str, *options: str, resume: tuple[str, ...] = ()):
        self.slurm, self.run, self.log = slurm, runs / name, runs / f"{name}.log"
        runs.mkdir(exist_ok=True)
        nodes = ["--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={self.log}"]
        script = [ROOT / "launch" / "slurm.sbatch", *arguments(runs, name, *resume)]
        self.number = slurm.ask("sbatch", "--parsable", *nodes, *options, *script, **NETWORK)

    @property
    def state(self) -> str:
        return self.slurm.job(self.number)["JobState"]

    def end(self, seconds: float = 200) -> str:
        """What it has printed, once it has completed."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        try:
            until(lambda: self.state in ended, f"the end of job {self.number}", seconds)
            assert self.state == "COMPLETED"
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.slurm.job(self.number)}\n{self.printed()}") from None
        return self.printed()

    def printed(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def restarts(self) -> int:
        return int(self.slurm.job(self.number)["Restarts"])

    def minutes(self) -> int:
        """Whole ones that it has run."""
        hours, minutes, _ = self.slurm.job(self.number)["RunTime"].split(":")
        return 60 * int(hours) + int(minutes)


def test_requeued_by_the_administrator(slurm: Slurm, uninterrupted: Path, tmp_path: Path):
    """SIGTERM from SLURM, to a job that was told to overwrite: only its first start may."""
    job = Job(slurm, tmp_path, "requeued", resume=("--overwrite",))
    with suspended(slurm.hosts, job.run, 8):
        slurm.ask("scontrol", "requeue", job.number)
    printed = job.end()
    assert STOPPED in printed and "resumed after step" in printed and QUEUED not in printed, printed
    assert job.restarts() == 1
    assert_same_run(job.run, uninterrupted)


def test_preempted(slurm: Slurm, uninterrupted: Path, tmp_path: Path):
    """A job of a higher partition takes both nodes; this one saves, waits until they are free and goes on."""
    job = Job(slurm, tmp_path, "preempted")
    with suspended(slurm.hosts, job.run, 8):
        rival = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"]
        other = slurm.ask("sbatch", "--parsable", *rival)
        until(lambda: slurm.job(job.number).get("PreemptTime") not in (None, "None"), "preemption")
    printed = job.end()
    assert slurm.job(other)["JobState"] == "COMPLETED"
    assert STOPPED in printed and QUEUED in printed and "resumed after step" in printed, printed
    assert job.restarts() == 1
    assert_same_run(job.run, uninterrupted)


def test_at_its_time_limit(slurm: Slurm, uninterrupted: Path, tmp_path: Path):
    """SIGUSR1 to the script, as `sbatch --signal=B:USR1@...` sends it, and the script queues the job again.

    The limit is drawn near once the run is at its eighth step: SLURM may send the signal a minute early.
    """
    job = Job(slurm, tmp_path, "limited", "--time=20", "--signal=B:USR1@30")
    with suspended(slurm.hosts, job.run, 8):
        slurm.ask("scontrol", "update", f"JobId={job.number}", f"TimeLimit={job.minutes() + 2}")
        until(lambda: "SIGUSR1" in job.printed(), "the signal before the time limit", 150)
        slurm.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=20")
    printed = job.end()
    assert STOPPED in printed and QUEUED in printed and "resumed after step" in printed, printed
    assert job.restarts() >= 1
    assert_same_run(job.run, uninterrupted)


def test_stopped_for_good(slurm: Slurm, tmp_path: Path):
    """SIGUSR1 to the ranks alone: they save, and the job ends."""
    job = Job(slurm, tmp_path, "stopped")
    with suspended(slurm.hosts, job.run, 8):
        slurm.ask("scancel", "--signal=USR1", job.number)
    printed = job.end()
    assert STOPPED in printed and QUEUED not in printed, printed
    assert job.restarts() == 0


def test_a_mistake_is_not_queued_again(slurm: Slurm, tmp_path: Path):
    job = Job(slurm, tmp_path, "mistaken", resume=("--train.micro_batch=3",))
    with pytest.raises(AssertionError, match="JobState': 'FAILED'"):
        job.end()
    assert "error:" in job.printed() and "micro_batch" in job.printed()
