"""The environment of a rank: its threads, and the kernels of its device.

`tests/processes/test_launch.py` has its GPU and the defaults.
"""

from __future__ import annotations

import os

import pytest
import torch

from sgtm.config.sections import KernelsConfig
from sgtm.distributed.env import cpu_threads, kernel_backend, use_deterministic_algorithms
from sgtm.process import cores
from sgtm.process.ranks import RankInfo


def test_threads_follow_the_quota(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(cores, "cpu_quota", lambda: 6.0)
    monkeypatch.setattr("torch.get_num_threads", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert cpu_threads(RankInfo("none")) == 6
    assert cpu_threads(RankInfo("torchrun", 0, 3, 0, 3)) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cpu_threads(RankInfo("none")) is None and cpu_threads(RankInfo("torchrun", 0, 3, 0, 3)) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert cpu_threads(RankInfo("torchrun", 0, 3, 0, 3)) is None


def test_kernels_follow_the_device_of_the_run_and_its_precision(monkeypatch):
    def backend(device: str, name: str = "auto", precision: str = "fp32") -> str:
        monkeypatch.setenv("DS_ACCELERATOR", device)
        return kernel_backend(KernelsConfig(backend=name), precision)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert (backend("cpu"), backend("cuda")) == ("torch", "triton")
    assert backend("cuda", "reference") == "reference"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend("cpu", "triton") == "triton"
    with pytest.raises(
        ValueError, match=r"'triton' was requested, but Triton's interpreter gives wrong results in bf16; use fp32"
    ):
        backend("cpu", "triton", "bf16")


def test_a_cublas_workspace_that_the_user_has_set_stands(monkeypatch):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    use_deterministic_algorithms()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
