"""Tests in this folder start no process; those that do are in tests/processes."""

import multiprocessing.process
import subprocess

import pytest


@pytest.fixture(autouse=True, scope="module")
def _no_process():
    def refuse(*args, **kwargs):
        raise AssertionError("a test of tests/unit starts a process; move its file to tests/processes")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", refuse)
        patch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
        yield
