"""The ahead-of-time suite: every kernel of every op compiles for every architecture; what breaks a rule is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgtm_kernels.dispatch import OPS
from sgtm_kernels.tools.aot import SHARED_BYTES, main

RIGHT = {
    "fine",
    "tensor cores",
    "columns of HGMMA",
    "narrow rows",
    "few narrower accesses",
    "some programs",
    "allowed to spill",
}
# Compiled in processes of their own: here Triton is in its interpreter.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))


def run(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=timeout
    )


def test_each_fault_is_a_problem():
    found = run(str(Path(__file__).with_name("faulty_kernels.py")))
    assert found.returncode == 0, found.stderr
    for name, problems in json.loads(found.stdout).items():
        if name in RIGHT:
            assert problems == []
        else:
            assert any(name in problem for problem in problems), (name, problems)


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [("--op", "norm,foo", ", ".join(OPS)), ("--arch", "90,foo", ", ".join(map(str, SHARED_BYTES)))],
)
def test_what_is_unknown_is_an_error_that_names_the_known(option, value, known, capsys):
    with pytest.raises(SystemExit) as ended:
        main([option, value])
    assert ended.value.code == 2 and f"argument {option}: 'foo' is none of {known}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_every_kernel_compiles(op):
    """For sm_90, which every launch is meant for; `make aot` compiles for all architectures, and CI calls it."""
    suite = run("-m", "sgtm_kernels.tools.aot", "--op", op, "--arch", "90", "--jobs", "1")
    assert suite.returncode == 0, suite.stdout + suite.stderr
    assert " 0 with problems" in suite.stdout
