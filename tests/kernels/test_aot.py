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
    process = run(str(Path(__file__).with_name("faulty_kernels.py")))
    assert process.returncode == 0, process.stderr
    for name, problems in json.loads(process.stdout).items():
        if name in RIGHT:
            assert problems == []
        else:
            assert any(name in problem for problem in problems), (name, problems)


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [
        ("--op", "norm,foo", ", ".join(OPS)),
        ("--arch", "90,foo", ", ".join(map(str, SHARED_BYTES))),
        ("--operands", "half,foo", "half, fp32"),
    ],
)
def test_what_is_unknown_is_an_error_that_names_the_known(option, value, known, capsys):
    with pytest.raises(SystemExit) as ended:
        main([option, value])
    assert ended.value.code == 2 and f"argument {option}: 'foo' is none of {known}" in capsys.readouterr().err


def test_kernels_of_one_precision_are_compiled():
    suite = run("-m", "sgtm_kernels.tools.aot", "--op", "adamw", "--arch", "90", "--operands", "fp32")
    assert suite.stdout.endswith("\n1 compiled, 0 with problems\n"), suite.stdout + suite.stderr


TOGETHER = r"""
import re
from sgtm_kernels.tools.aot import _compile, _of, disassemble
def without_addresses(code):
    return re.sub(r"/\*\w+\*/ *|0x\w+", "", code)
cubins = [_compile(variant, 90).asm["cubin"] for variant in _of("adamw")]
alone = [without_addresses(disassemble([cubin], 90)[0]) for cubin in cubins]
assert len(set(alone)) == 3 and all("EXIT" in code for code in alone)
assert list(map(without_addresses, disassemble(cubins, 90))) == alone
"""


def test_kernels_disassembled_together_have_the_code_that_each_has_alone():
    done = run("-c", TOGETHER)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_every_kernel_compiles(op):
    """For sm_90 in half precision, as runs train; `make aot` compiles the rest too, and CI calls it."""
    suite = run("-m", "sgtm_kernels.tools.aot", "--op", op, "--arch", "90", "--operands", "half", "--jobs", "1")
    assert suite.returncode == 0, suite.stdout + suite.stderr
    assert " 0 with problems" in suite.stdout
