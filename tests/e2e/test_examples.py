"""Every script of examples/ runs, and prints what it is there to show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgtm.process.ranks import TORCH_VARIABLES

EXAMPLES = Path(__file__).parents[2] / "examples"
PRINTED = {
    "train.py": "without es {'en': ",
    "remove_and_generate.py": "Once upon a time",
    "label_rule.py": "virology: forget:bio, ",
    "strategy.py": "mlp_out  forget:es  retain 0.1 es 1",
    "hf_trainer.py": "without es: en ",
    "mask_one_layer.py": "bio rows learn from sequence 1 alone: True",
}


def test_all_are_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PRINTED)


@pytest.mark.parametrize("name", PRINTED)
def test_an_example(name, tmp_path):
    # Without what a training in this process has set, which a Trainer takes for half a launch.
    environ = {name: value for name, value in os.environ.items() if name not in TORCH_VARIABLES}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, str(EXAMPLES / name), str(tmp_path / "out")]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert PRINTED[name] in done.stdout
