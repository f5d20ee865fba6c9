"""The command line of Nsight Compute; tests/processes/test_profile.py has the names of kernels."""

import shlex
import sys

import pytest

from sgtm.measure import nsight
from sgtm.measure.nsight import find_kernel, nsight_command, triton_kernels


def test_the_command_is_one_line_for_a_shell():
    line = nsight_command("norm_forward", ["debug", "--name", "my run"], 3, "runs/my run/norm_forward")
    assert shlex.split(line) == [
        "ncu", "--kernel-name", "regex:^norm_forward$", "--launch-skip", "3", "--launch-count", "1", "--set", "full",
        "--force-overwrite", "-o", "runs/my run/norm_forward", sys.executable, "-m", "sgtm", "profile", "debug",
        "--name", "my run",
    ]  # fmt: skip


def test_without_triton_and_gpu_there_is_no_kernel_to_name(monkeypatch):
    monkeypatch.setattr(nsight, "find_spec", lambda name: None)
    assert triton_kernels() == []
    with pytest.raises(ValueError) as error:
        find_kernel("norm_forward", [])
    assert str(error.value) == (
        "--kernel norm_forward: no such kernel; Triton kernels: none, Triton is not installed; kernels of this trace: "
        "none, there is no GPU"
    )
