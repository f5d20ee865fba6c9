"""In tests/unit nothing starts a process: the conftest there, on a folder of tests that try."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bare import python_path

TESTS = Path(__file__).parents[1]
STARTS = """
import multiprocessing, os, pty, subprocess

def test_fork():
    if os.fork() == 0:
        os._exit(0)

def test_forkpty():
    if pty.fork()[0] == 0:
        os._exit(0)

def test_spawnv():
    os.spawnv(os.P_WAIT, "/bin/true", ["true"])

def test_system():
    os.system("true")

def test_popen():
    os.popen("true").close()

def test_posix_spawn():
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)

def test_run():
    subprocess.run(["true"])

def test_process_by_fork():
    multiprocessing.get_context("fork").Process(target=int).start()

def test_process_by_spawn():
    multiprocessing.get_context("spawn").Process(target=int).start()
"""


@pytest.mark.cold
def test_no_way_to_start_a_process_is_left(tmp_path):
    for folder in ("unit", "processes"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"test_starts_of_{folder}.py").write_text(STARTS)
    shutil.copy(TESTS / "process_starts.py", tmp_path)
    shutil.copy(TESTS / "unit" / "conftest.py", tmp_path / "unit")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rfp", "-p", "no:cacheprovider", "unit", "processes"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": python_path(tmp_path), "COLUMNS": "200"}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    for line in STARTS.splitlines():
        if line.startswith("def "):
            name = line.removeprefix("def ").removesuffix("():")
            refused = f"unit/test_starts_of_unit.py::{name} - AssertionError: a test of tests/unit starts a process"
            assert f"FAILED {refused}" in done.stdout, name
            assert f"PASSED processes/test_starts_of_processes.py::{name}\n" in done.stdout, name
