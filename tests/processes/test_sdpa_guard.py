"""SDPA without heads raises in every process of the tests: torch 2.11 would end the process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bare import environment_without, python_path
from ranks import run_ranks

CALL = "import torch; q = torch.ones(1, 0, 2, 2); torch.nn.functional.scaled_dot_product_attention(q, q, q)"
ERROR = r"without heads: query \(1, 0, 2, 2\)"


def attend_without_heads() -> str:
    with pytest.raises(ZeroDivisionError) as error:
        exec(CALL)
    return str(error.value)


def test_in_this_process():
    with pytest.raises(ZeroDivisionError, match=ERROR):
        exec(CALL)
    q = torch.randn(1, 2, 3, 4)
    assert F.scaled_dot_product_attention(q, q, q).shape == q.shape


def test_in_a_rank():
    assert "without heads" in run_ranks(attend_without_heads, 1)[0]


@pytest.mark.parametrize("environment", ["inherited", "another path", "without packages"])
def test_in_a_command(environment, tmp_path):
    environ = {
        "inherited": lambda: None,
        "another path": lambda: os.environ | {"PYTHONPATH": python_path(tmp_path)},
        "without packages": lambda: environment_without(("pydantic",), tmp_path),
    }[environment]()
    done = subprocess.run([sys.executable, "-c", CALL], env=environ, capture_output=True, text=True)
    assert done.returncode == 1 and "ZeroDivisionError: scaled_dot_product_attention without heads" in done.stderr


def test_no_test_sets_a_path_without_the_guard():
    """Each takes the one that is there, or `python_path`."""
    setting = re.compile(r"""["']PYTHONPATH["'](?::|\] =)|\bPYTHONPATH=""")
    lines = [
        f"{file.name}: {line.strip()}"
        for file in Path(__file__).parents[1].rglob("*.py")
        for line in file.read_text("utf-8").splitlines()
        if setting.search(line) and "= re.compile" not in line
    ]
    keeps = re.compile(r"""python_path\(|(environ|bare)(\.get\(|\[)["']PYTHONPATH|sys\.path""")
    assert len(lines) >= 10 and [line for line in lines if not keeps.search(line)] == []
