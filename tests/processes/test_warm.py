"""A process that is a fork of the warm one is as a new interpreter would be."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import warm
from waiting import wait_until

from sgtm.data.synthetic import open_synthetic

SHOW = """
import json, os, signal, sys
print(json.dumps({
    "argv": sys.argv, "name": __name__, "file": __file__, "path": sys.path[0], "folder": os.getcwd(),
    "parent": os.getppid(), "session": os.getsid(0) == os.getpid(), "environment": os.environ.get("OF_THE_TEST"),
    "cores": sorted(os.sched_getaffinity(0)), "input": sys.stdin.read(), "warm": "warm" in sys.modules,
}))
print("to stderr", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
START = """
import subprocess, sys
if sys.argv[1] != "0":
    subprocess.run([sys.executable, __file__, str(int(sys.argv[1]) - 1)], check=True)
else:
    import os
    print(os.getpid(), os.getppid(), "warm" in sys.modules, flush=True)
"""


@pytest.fixture
def script(tmp_path):
    def write(code: str) -> str:
        file = tmp_path / "script.py"
        file.write_text(code)
        return str(file)

    return write


@pytest.fixture(params=["fork", pytest.param("new", marks=pytest.mark.cold)])
def kind(request) -> str:
    return request.param


def test_a_fork_is_as_a_new_interpreter(script, tmp_path, kind):
    command = [sys.executable, script(SHOW), "3", "words"]
    done = subprocess.run(
        command, cwd=tmp_path, input="text", capture_output=True, text=True, start_new_session=True,
        env={**os.environ, "OF_THE_TEST": "yes"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "to stderr\n")
    assert json.loads(done.stdout) == {
        "argv": command[1:], "name": "__main__", "file": command[1], "path": str(tmp_path), "folder": str(tmp_path),
        "parent": os.getpid(), "session": True, "environment": "yes", "cores": sorted(os.sched_getaffinity(0)),
        "input": "text", "warm": kind == "fork",
    }  # fmt: skip


def test_a_module_and_an_installed_script_print_what_they_do_elsewhere(kind):
    for command in ([sys.executable, "-m", "sgtm"], [str(Path(sys.executable).with_name("sgtm"))], ["sgtm"]):
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, env={**os.environ, "PATH": path})
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("sgtm ")


def test_an_exception_ends_a_fork_with_its_traceback(script):
    done = subprocess.run([sys.executable, script("raise ValueError('of the script')")], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("\nValueError: of the script\n")


def test_a_signal_ends_a_fork(script):
    process = subprocess.Popen([sys.executable, script("print(flush=True); import time; time.sleep(1000)")], stdout=-1)
    process.stdout.readline()
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_what_a_fork_starts_is_its_own_child_and_a_fork_too(script):
    process = subprocess.Popen([sys.executable, script(START), "2"], stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate()
    pid, parent, is_warm = output.split()
    assert is_warm == "True" and len({process.pid, int(parent), int(pid), os.getpid()}) == 4


def test_no_server_outlives_its_process(tmp_path):
    """Its process id goes to a file: to read it from a pipe, which the server has too, would be to wait for its end."""
    file = tmp_path / "server"
    code = f"""
import sys
sys.path.insert(0, {str(Path(warm.__file__).parent)!r})
import warm
assert warm.Popen([sys.executable, "-m", "sgtm", "--version"], stdout=-3).wait() == 0
open({str(file)!r}, "w").write(str(warm._server.pid))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    server = int(file.read_text())
    wait_until(lambda: not psutil.pid_exists(server))


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (["python", "-c", "pass"], {}),
        (["python", "-I", "script.py"], {}),
        (["python", "script.py"], {"preexec_fn": os.getpid}),
        (["python", "script.py"], {"env": {**os.environ, "TRITON_INTERPRET": "0"}}),
        (["python", "script.py"], {"pass_fds": [1]}),
        (["python", "script.py"], {"cwd": "copy"}),
        (["git", "--version"], {}),
        ("python script.py", {"shell": True}),
    ],
)
def test_what_a_fork_would_not_do_right_is_a_new_process(command, options, tmp_path, monkeypatch):
    (tmp_path / "copy" / "sgtm").mkdir(parents=True)
    (tmp_path / "script.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warm, "_start", lambda *_: pytest.fail("a fork"))
    if command[0] == "python":
        command = [sys.executable, *command[1:]]
    if options.get("cwd"):
        command[1] = str(tmp_path / command[1])
    assert subprocess.run(command, capture_output=True, **options).returncode in (0, 127)


def test_a_corpus_that_is_copied_is_whole_and_of_this_version(tmp_path):
    """As `open_synthetic` sees by the hashes of its files, where it may not write."""
    first = open_synthetic(tmp_path / "first", 512)
    second = open_synthetic(tmp_path / "second", 512)
    assert first.path != second.path and first.manifest == second.manifest
    assert open_synthetic(tmp_path / "second", 512, write=False).manifest == second.manifest
