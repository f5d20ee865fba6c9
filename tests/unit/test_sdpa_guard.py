"""SDPA without heads raises in every process of the tests: torch 2.11 would end the process."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from sgtm.distributed.testing import run_ranks

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


def test_in_a_command():
    done = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "ZeroDivisionError: scaled_dot_product_attention without heads" in done.stderr
