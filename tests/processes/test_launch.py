"""Ranks that do not meet, the device and threads of a rank, and what the scripts of launch/ start."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from waiting import PATIENCE, wait_until

from sgtm.distributed import env
from sgtm.process.ranks import TORCH_VARIABLES, RankInfo, detect_launch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_do_not_meet_are_one_message(rank, tmp_path):
    """Rank 0 waits for nobody, rank 1 finds nobody."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # and nobody listens there; rank 0 takes any free port
        port = reserved.getsockname()[1] if rank else 0
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        command = [sys.executable, "-m", "sgtm", "train", "debug", f"--runs={tmp_path}"]
        done = subprocess.run(
            [*command, "--distributed.timeout_minutes=0.03"], capture_output=True, text=True,
            env={**os.environ, **variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"error: rank {rank}: the ranks did not meet at MASTER_ADDR 127.0.0.1, MASTER_PORT {port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_rank_takes_a_gpu_that_is_there():
    ranks = [RankInfo("torchrun", rank, 4, rank, 4) for rank in range(4)]
    assert [env.gpu_of(rank, 4) for rank in ranks] == [0, 1, 2, 3]
    assert [env.gpu_of(rank, 1) for rank in ranks] == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="4 ranks on this node, but 2 GPUs are visible to rank 3"):
        env.gpu_of(ranks[3], 2)


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_algorithms_on_a_gpu(wanted, monkeypatch):
    """As far as it goes without one: up to the process group."""
    from sgtm.config import load_config
    from sgtm.distributed import process_group

    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(process_group, "device_type", lambda: "cuda")
    monkeypatch.setattr(process_group, "gpu_of", lambda *args: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(process_group.dist, "init_process_group", lambda *args, **kwargs: None)
    try:
        config = load_config("debug", [f"--kernels.deterministic={wanted}"])
        process_group._join(config.distributed, config.kernels)
        flags = torch.are_deterministic_algorithms_enabled(), "CUBLAS_WORKSPACE_CONFIG" in os.environ
        assert flags == (wanted, wanted) and torch.utils.deterministic.fill_uninitialized_memory is not wanted
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # SDPA's backward pass would add in any order
    finally:
        torch.use_deterministic_algorithms(False)
        for name in ("CUBLAS_WORKSPACE_CONFIG", "LOCAL_RANK"):
            os.environ.pop(name, None)


def test_one_place_says_which_device(monkeypatch):
    monkeypatch.setattr(env.torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert env.device_type() == "cuda"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert env.device_type() == "cpu"


def test_cores_are_divided_between_ranks_unless_the_user_has_said(monkeypatch):
    monkeypatch.setattr(env.os, "sched_getaffinity", lambda pid: range(12))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert env.cpu_threads(RankInfo("torchrun", 0, 4, 0, 4)) == 3
    assert env.cpu_threads(RankInfo("torchrun", 0, 64, 0, 64)) == 1
    assert env.cpu_threads(RankInfo("none")) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert env.cpu_threads(RankInfo("torchrun", 0, 4, 0, 4)) is None


def test_defaults_do_not_override(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    env.set_defaults(cuda=True)
    assert "DS_ACCELERATOR" not in env.os.environ
    env.set_defaults(cuda=False)
    assert env.os.environ["TRITON_CACHE_DIR"] == "/mine" and env.os.environ["DS_ACCELERATOR"] == "cpu"


def with_commands(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment whose PATH begins with these commands."""
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix}


def slurm_sbatch(folder: Path, *arguments: str, srun: str, job: str = "", **variables: str):
    """launch/slurm.sbatch with stand-ins for SLURM's commands: a job of two nodes; `scontrol requeue` is written down.

    job  what `scontrol show job` prints. tests/cluster/test_slurm.py runs it under SLURM.
    """
    scontrol = (
        '#!/bin/sh\ncase "$1 $2" in\n"show hostnames") echo "$3" | tr , "\\n";;\n'
        f'"show job") echo "{job}";;\n*) echo "$@" >"{folder}/said";;\nesac\n'
    )
    environ = with_commands(folder, srun=srun, scontrol=scontrol)
    environ |= {"SLURM_JOB_NODELIST": "node-3,node-4", "SLURM_JOB_ID": "70123", "SLURM_CPUS_PER_TASK": "8"}
    return subprocess.Popen(
        ["bash", ROOT / "launch" / "slurm.sbatch", *arguments],
        env={**environ, "SLURM_SUBMIT_DIR": str(ROOT), **variables}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


NOTE = f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n"


def test_slurm_starts_the_ranks_themselves(tmp_path):
    """Anything between srun and the rank would keep SLURM's signals to itself."""
    printed, _ = slurm_sbatch(tmp_path, "my.yaml", "--resume", srun=NOTE).communicate(timeout=PATIENCE)
    arguments, environ = json.loads(printed)
    options = [argument for argument in arguments if argument.startswith("--") and argument != "--resume"]
    assert options == ["--kill-on-bad-exit=1", "--cpus-per-task=8"]
    assert arguments[len(options) :] == ["python", "-m", "sgtm", "train", "my.yaml", "--resume"]
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("node-3", "29523")
    step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
    assert detect_launch({**environ, **step, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}) == RankInfo("srun", 5, 8, 1, 4)


@pytest.mark.parametrize("options", [[], ["--overwrite"], ["--resume"], ["--resume", "auto"]])
def test_a_restarted_job_resumes(tmp_path, options):
    job = slurm_sbatch(tmp_path, "my.yaml", *options, "--name=a b", srun=NOTE, SLURM_RESTART_COUNT="1")
    arguments, _ = json.loads(job.communicate(timeout=PATIENCE)[0])
    resume = options if "--resume" in options else ["--resume"]
    assert sorted(arguments[arguments.index("train") + 1 :]) == sorted(["my.yaml", "--name=a b", *resume])


@pytest.mark.parametrize(
    ("signalled", "job", "status", "queued"),
    [
        (True, "JobState=RUNNING Reason=None PreemptTime=None", 0, True),
        (True, "JobState=RUNNING Reason=None PreemptTime=None", 3, False),
        (True, "JobState=RUNNING Reason=None PreemptTime=None", 128 + signal.SIGUSR1, True),
        (True, "JobState=CANCELLED Reason=None PreemptTime=None", 0, False),
        (False, "JobState=RUNNING Reason=None PreemptTime=None", 0, False),
        (False, "JobState=RUNNING Reason=None PreemptTime=2026-11-22T06:00:00", 0, True),
        (False, "JobState=RUNNING Reason=None PreemptTime=2026-11-22T06:00:00", 3, False),
    ],
)
def test_a_job_is_queued_again_if_there_is_more_to_train(tmp_path, signalled, job, status, queued):
    """SIGUSR1 goes to srun, whose exit status is that of the job; `scontrol requeue` only for a run that has saved."""
    ends = f"exit {status}"
    srun = f"#!/bin/bash\ntrap '{ends}' USR1; touch '{tmp_path}/up'\nfor i in $(seq 20000); do sleep 0.1; done\n"
    script = slurm_sbatch(tmp_path, "my.yaml", srun=srun if signalled else f"#!/bin/sh\n{ends}\n", job=job)
    try:
        if signalled:
            wait_until((tmp_path / "up").exists, script)
            script.send_signal(signal.SIGUSR1)
        assert script.wait(timeout=PATIENCE) == status
    finally:
        script.kill()
        script.communicate()
    assert (tmp_path / "said").exists() == queued
    assert not queued or (tmp_path / "said").read_text() == "requeue 70123\n"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_torchrun_passes_on_what_ends_a_run_early_and_waits(tmp_path, number):
    worker = (
        "trap 'echo USR1 >> got; exit 0' USR1; trap 'echo TERM >> got; exit 0' TERM\n"
        "sleep 2\n"  # a signal that comes while torchrun starts a worker is lost on that worker
        'echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > waits; for i in $(seq 20000); do sleep 0.1; done\n'
    )
    environ = with_commands(tmp_path, worker=f"#!/bin/bash\n{worker}")
    start = f"source {ROOT}/launch/env.sh; exec torchrun --standalone --nproc-per-node 1 --no-python worker"
    launched = subprocess.Popen(["bash", "-c", start], cwd=tmp_path, env=environ, stderr=subprocess.DEVNULL)
    try:
        wait_until((tmp_path / "waits").exists, launched)
        launched.send_signal(number)
        launched.wait(timeout=PATIENCE)
    finally:
        launched.kill()
    assert (tmp_path / "got").read_text() == f"{number.name.removeprefix('SIG')}\n"
    assert int((tmp_path / "waits").read_text()) == 300


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_a_run_on_a_cpu_keeps_freed_memory():
    """Once it has been there, memory for tensors of every size is there: none of their pages is faulted in again."""
    code = """
import resource, sys, torch
from sgtm.config import load_config
from sgtm.distributed import process_group
if "freed" in sys.argv:
    process_group.keep_freed_memory = lambda: None
config = load_config("debug", [])
process_group.init_distributed(config.distributed, config.kernels)
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(mib * 2**20, dtype=torch.uint8) for mib in (64, 40, 100, 64, 33)]
    del tensors
print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environ = {k: v for k, v in os.environ.items() if k not in (*TORCH_VARIABLES, "LD_PRELOAD")}

    def faults(*arguments: str) -> int:
        command = [sys.executable, "-c", code, *arguments]
        run = subprocess.run(command, capture_output=True, text=True, env=environ)
        assert run.returncode == 0, run.stderr
        return int(run.stdout.split("faults ")[1])

    assert 2 * faults() < faults("freed")
