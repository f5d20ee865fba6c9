"""A signal ends a command within seconds, with a status and a line that show it, and no later stage begins."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sgtm.commands.main import main
from sgtm.process.signals import SIGNALS, Stopped, stoppable


@pytest.fixture(autouse=True)
def handlers_stay():
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("extends: debug\n")
    return tmp_path


def stub(monkeypatch, module: str, **functions) -> None:
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**functions))


def raises(number: int):
    return lambda *args, **options: signal.raise_signal(number)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("command", ["eval", "export", "report"])
def test_a_command_that_is_stopped_prints_how_to_run_it_again(monkeypatch, capfd, run: Path, command: str, number):
    later: list = []
    stub(monkeypatch, "sgtm.run.evaluate", evaluate_run=raises(number), write_summary=lambda *args: later.append(args))
    stub(monkeypatch, "sgtm.hf.export", export_run=raises(number))
    monkeypatch.setattr("sgtm.report.write_report", raises(number))
    words = [command, str(run), *(["--remove", "es", "--out", "a b"] if command == "export" else [])]
    assert main(words) == 128 + number and not later
    again = " ".join(words).replace("a b", "'a b'")
    assert capfd.readouterr().err == f"stopped by {signal.Signals(number).name}; again: sgtm {again}\n"


def test_a_quickstart_that_is_stopped_in_training_goes_no_further(monkeypatch, tmp_path: Path, capfd):
    def stopped(*args, **options):
        raise Stopped(signal.SIGTERM)

    stub(monkeypatch, "sgtm.training.loop", train=stopped)
    stub(monkeypatch, "sgtm.run.evaluate", evaluate_run=lambda run: pytest.fail("evaluated"), write_summary=None)
    assert main(["quickstart", "--runs", str(tmp_path)]) == 128 + signal.SIGTERM
    assert main(["train", "debug", "--runs", str(tmp_path)]) == 128 + signal.SIGTERM
    assert "stopped" not in capfd.readouterr().err, "the training itself prints it"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "debug", "--runs", str(tmp_path)]) == 0, "a launcher would kill the other rank"


def test_a_quickstart_that_is_stopped_after_training_prints_what_is_left(monkeypatch, tmp_path: Path, capfd):
    stub(monkeypatch, "sgtm.training.loop", train=lambda config, **options: Path(config.runs) / config.name)
    stub(monkeypatch, "sgtm.run.evaluate", evaluate_run=raises(signal.SIGTERM), write_summary=None)
    assert main(["quickstart", "--runs", str(tmp_path)]) == 128 + signal.SIGTERM
    run = tmp_path / "quickstart"
    expected = f"stopped by SIGTERM; {run} is trained; continue: sgtm eval {run}; sgtm report {run}\n"
    assert capfd.readouterr().err == expected


def test_a_training_that_is_stopped_before_its_first_step(monkeypatch, tmp_path: Path, capfd):
    stub(monkeypatch, "sgtm.training.loop", train=raises(signal.SIGTERM))
    assert main(["train", "debug", "--runs", str(tmp_path), "--overwrite"]) == 128 + signal.SIGTERM
    again = f"again: sgtm train debug --overwrite --runs {tmp_path}"
    assert capfd.readouterr().err == f"stopped by SIGTERM; {again}\n"


def test_a_scheduler_that_repeats_itself_does_not_interrupt_the_clean_up(capfd):
    cleaned = []
    with pytest.raises(Stopped), stoppable("again: it"):
        try:
            signal.raise_signal(signal.SIGUSR1)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)
    assert cleaned and capfd.readouterr().err == "stopped by SIGUSR1; again: it\n"


NOT_OVER = {
    "a clean-up that waits": """
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        threading.Event().wait(20)
""",  # as that of a pool whose thread reads a large file
    "C code": """
    threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGTERM]).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 3 * 10**7)
""",
}


def in_block(code: str) -> tuple[int, str]:
    """Exit status and stderr of code in a block whose grace is short."""
    before = "import hashlib, os, signal, threading, time\nfrom sgtm.process import signals\nsignals.GRACE = 0.2\n"
    script = f"{before}with signals.stoppable('again: it'):{code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("code", NOT_OVER)
def test_a_block_that_does_not_end_is_cut_short(code: str):
    assert in_block(NOT_OVER[code]) == (128 + signal.SIGTERM, "stopped by SIGTERM; again: it\n")


def test_a_signal_that_a_destructor_swallows_stops_the_command(capfd, monkeypatch):
    class Last:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    swallowed = []
    monkeypatch.setattr(sys, "unraisablehook", swallowed.append)
    with pytest.raises(Stopped) as raised, stoppable("again: it"):
        Last()
    assert swallowed and raised.value.status == 128 + signal.SIGTERM
    assert capfd.readouterr().err == "stopped by SIGTERM; again: it\n"


def test_signals_of_handlers_in_the_block_and_of_children_are_theirs():
    """As of a training, which saves first."""
    code = """
    heard = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *arguments: heard.set())
    signal.raise_signal(signal.SIGUSR1)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, lambda *arguments: os._exit(0))
        signal.raise_signal(signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == 0 and heard.is_set()
    time.sleep(0.5)
"""
    assert in_block(code) == (0, "")
