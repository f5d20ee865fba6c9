"""Where a process thinks it is, from the variables of each launcher."""

from __future__ import annotations

import pytest

from sgtm.distributed import env
from sgtm.distributed.env import Launch, detect_launch

ADDRESS = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
PLACE = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launch("none")),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, Launch("none")),  # a batch script's own shell
        (
            {**PLACE, **ADDRESS, "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"},
            Launch("torchrun", 5, 8, 1, 4),
        ),
        ({**PLACE, **ADDRESS, "LOCAL_SIZE": "4", "CROSS_RANK": "1"}, Launch("deepspeed", 5, 8, 1, 4)),
        ({**PLACE, **ADDRESS}, Launch("env", 5, 8, 1, 1)),
        (
            {
                **ADDRESS,
                "SLURM_STEP_ID": "0",
                "SLURM_NTASKS": "8",
                "SLURM_PROCID": "5",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
            },
            Launch("srun", 5, 8, 1, 4),
        ),
    ],
)
def test_place_of_the_process(variables, expected):
    assert detect_launch(variables) == expected


def test_half_a_launch_names_what_is_missing():
    with pytest.raises(ValueError, match=r"MASTER_ADDR, MASTER_PORT not set.*unset RANK, WORLD_SIZE, LOCAL_RANK"):
        detect_launch(PLACE)
    with pytest.raises(ValueError, match="srun, but MASTER_ADDR, MASTER_PORT not set"):
        detect_launch({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    with pytest.raises(ValueError, match=r"whole numbers.*'RANK': 'one'"):
        detect_launch({**PLACE, **ADDRESS, "RANK": "one"})


def test_cores_are_divided_between_ranks_unless_the_user_has_said(monkeypatch):
    monkeypatch.setattr(env.os, "sched_getaffinity", lambda pid: range(12))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert env.cpu_threads(Launch("torchrun", 0, 4, 0, 4)) == 3
    assert env.cpu_threads(Launch("torchrun", 0, 64, 0, 64)) == 1
    assert env.cpu_threads(Launch("none")) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert env.cpu_threads(Launch("torchrun", 0, 4, 0, 4)) is None


def test_defaults_do_not_override(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    env.set_defaults(cuda=True)
    assert "DS_ACCELERATOR" not in env.os.environ
    env.set_defaults(cuda=False)
    assert env.os.environ["TRITON_CACHE_DIR"] == "/mine" and env.os.environ["DS_ACCELERATOR"] == "cpu"
