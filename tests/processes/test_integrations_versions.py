"""Masked models in transformers 4.57, which the Makefile installs beside the installed version, and in that version.

Activation checkpointing is another function in the two: `__call__` of a layer there, `forward` here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from bare import python_path
from hf_models import CONFIGS

ROOT = Path(__file__).parents[2]
FOUR = ROOT / ".venv" / "transformers-4"
OWN = [f"{projection}.bio" for projection in ("attn_in", "attn_out", "mlp_in", "mlp_out")]


MISSING = not (FOUR / ".installed").is_file()


@pytest.mark.parametrize(
    "version",
    [
        pytest.param("4.57.", marks=pytest.mark.skipif(MISSING, reason="no transformers 4.57: make test installs it")),
        transformers.__version__,
    ],
)
def test_every_family_is_masked(version):
    first = FOUR if version == "4.57." else ""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "masked_families.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": python_path(first, os.environ.get("PYTHONPATH", ""))},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert list(facts) == list(CONFIGS)
    for family, fact in facts.items():
        assert fact["version"].startswith(version)
        assert fact["same_logits"] and fact["removed"], family
        assert fact["checkpointed"] == [[], []], family
        by_bio, by_retain = fact["taught"]
        assert by_bio == OWN, family
        assert "mlp_in.retain" in by_retain and not [key for key in by_retain if key.endswith((".bio", ".code"))]
