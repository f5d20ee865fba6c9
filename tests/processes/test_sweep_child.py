"""A run of a sweep ends with the process that started it, and is `sgtm` otherwise."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sgtm.commands.main import main

ROOT = Path(__file__).parents[2]
CHILD = """
import signal, sys
from sgtm.commands.sweep_child import end_with
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("SIGTERM")))
end_with(int(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
"""
PARENT = """
import os, subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], str(os.getpid())])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel sends the signal on Linux alone")
def test_the_child_gets_sigterm_when_its_parent_is_killed():
    """Before its input ends, which would end it too."""
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        parent.wait()
        assert parent.communicate()[0] == "SIGTERM\n"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the child does not end with its parent")
def test_a_child_whose_parent_has_ended_already_runs_nothing():
    done = started(os.getppid(), "config")
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")


def test_the_arguments_after_the_parent_are_those_of_sgtm(capsys):
    assert main(["config", "debug", "--train.steps", "3"]) == 0
    done = started(os.getpid(), "config", "debug", "--train.steps", "3")
    assert (done.returncode, done.stdout) == (0, capsys.readouterr().out)


def started(parent: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sgtm.commands.sweep_child", str(parent), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
