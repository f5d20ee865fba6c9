"""What scripts import from `sgtm` is what the commands call, and imports nothing before it is used."""

import subprocess
import sys

import pytest

import sgtm


def test_names_are_those_of_the_commands():
    from sgtm.hf.export import export_run
    from sgtm.run.evaluate import evaluate_run
    from sgtm.training.loop import train

    assert (sgtm.train, sgtm.evaluate, sgtm.export) == (train, evaluate_run, export_run)
    assert sorted(sgtm.__all__) == dir(sgtm)
    for name in sgtm.__all__:
        getattr(sgtm, name)


def test_importing_is_light():
    code = "import sys, sgtm; print(sorted({'torch', 'pydantic', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'sgtm' has no attribute 'trian'"):
        sgtm.trian  # noqa: B018


def test_old_names_are_dropped_in_their_time():
    version = tuple(map(int, sgtm.__version__.split(".")[:2]))
    assert version < (0, 3), "drop OLD_NAMES of sgtm/commands/main.py, and RENAMED of sgtm_kernels"
