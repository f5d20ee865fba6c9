"""A signal in any phase of the real commands: status and line show it, what was finished is kept, and the line's
command resumes from it. The signal arrives at a known point, when a function of the phase is called.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from corpora import BYTES, build, contents, mixed_records, write_jsonl
from exports import GPT_NEO, make_run
from waiting import PATIENCE

from sgtm import config
from sgtm.commands.main import main
from sgtm.data import encode, readers
from sgtm.data import prepare as prepare_module
from sgtm.process.signals import SIGNALS

RULES = "split: {field: split}\nlabels: {en: retain, es: 'forget:es', web: unlabeled}\n"
HERE = "here\n"


@pytest.fixture(autouse=True)
def handlers_stay():
    def not_handled(number: int, frame) -> None:
        raise AssertionError(f"{signal.Signals(number).name} would have killed the process")

    before = [signal.signal(number, not_handled) for number in SIGNALS]
    yield
    assert {signal.getsignal(number) for number in SIGNALS} == {not_handled}
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def signalled(monkeypatch, owner, name: str, number: int = signal.SIGTERM, after: int = 0) -> None:
    """The function sends the signal to this process, before its `after`-th call counted from 0."""
    original, calls = getattr(owner, name), []

    def call(*args, **options):
        calls.append(name)
        if len(calls) == after + 1:
            signal.raise_signal(number)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, call)


@pytest.fixture
def words(tmp_path: Path, monkeypatch) -> list[str]:
    """Arguments of a `prepare` of three blocks."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 5000)
    source = write_jsonl(tmp_path / "a.jsonl", mixed_records())
    (tmp_path / "rules.yaml").write_text(RULES)
    options = ["--vocab-size", str(BYTES), "--workers", "1"]
    return ["prepare", str(source), "--rules", str(tmp_path / "rules.yaml"), "--out", str(tmp_path / "out"), *options]


def elsewhere(words: list[str], out: Path) -> list[str]:
    return [str(out) if word.endswith("/out") else word for word in words]


PHASES = {
    "discovering": (prepare_module, "find_sources", 0, 0),
    "sampling": (prepare_module, "sample_texts", 0, 0),
    "tokenizer": (prepare_module, "train_bpe", 0, 0),
    "first block": (encode.Encoder, "encode", 0, 0),
    "third block": (encode.Encoder, "encode", 2, 2),
    "writing a block": (np, "savez", 1, 1),
    "merging": (prepare_module, "_merge", 0, 3),
    "index": (prepare_module.CorpusWriter, "finish", 0, 3),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_prepare_that_is_stopped_continues(monkeypatch, tmp_path: Path, capfd, words, phase: str):
    owner, name, after, count = PHASES[phase]
    number = SIGNALS[len(phase) % len(SIGNALS)]
    with monkeypatch.context() as patch:
        signalled(patch, owner, name, number, after)
        assert main(words) == 128 + number
    line = f"stopped by {signal.Signals(number).name}; finished work is kept; continue: {shlex.join(['sgtm', *words])}"
    assert capfd.readouterr().err == f"{line}\n"
    out = tmp_path / "out"
    blocks = {path: path.stat().st_mtime_ns for path in out.glob("blocks/*/*")}
    assert len(blocks) == count and not [path for path in blocks if path.suffix != ".npz"]
    encoded = []
    original = encode.Encoder.encode
    monkeypatch.setattr(encode.Encoder, "encode", lambda *args: encoded.append(args) or original(*args))
    assert main(words) == 0 and len(encoded) == 3 - count
    assert main(elsewhere(words, tmp_path / "whole")) == 0
    assert contents(out) == contents(tmp_path / "whole")


STOPPED_IN_WORKERS = """
import os, signal, sys, time
from sgtm.commands.main import main
from sgtm.data import encode, readers

def finish_and_wait(pending):
    finish(pending)
    print("here", flush=True)
    time.sleep(300)

if __name__ == "__mp_main__" and sys.argv[1] == "importing":  # a worker
    os.write(1, b"here\\n")  # at once, as two workers write
    end = time.monotonic() + 5
    while signal.SIGINT not in signal.sigpending() and time.monotonic() < end:
        time.sleep(0.01)
if __name__ == "__main__":
    readers.BLOCK_BYTES = 500
    finish, encode._finish = encode._finish, finish_and_wait
    sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("number", "when"), [(signal.SIGINT, "importing"), (signal.SIGTERM, "working")])
def test_a_terminal_and_a_scheduler_signal_the_workers_too(tmp_path: Path, words, number: int, when: str):
    (tmp_path / "script.py").write_text(STOPPED_IN_WORKERS)
    command = [sys.executable, str(tmp_path / "script.py"), when, *words[:-1], "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    lines = iter(process.stdout.readline, "")
    assert HERE in lines, process.communicate()
    os.killpg(process.pid, number)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 128 + number
    go_on = shlex.join(["sgtm", *words[:-1], "2"])
    assert errors == f"stopped by {signal.Signals(number).name}; finished work is kept; continue: {go_on}\n"


@pytest.mark.parametrize("command", ["train", "quickstart"])
def test_a_training_that_is_stopped_before_its_modules_are_imported(monkeypatch, capfd, command: str):
    words = [command, *["debug"] * (command == "train"), "--train.steps", "9"]
    signalled(monkeypatch, config, "load_config")
    assert main(words) == 128 + signal.SIGTERM
    assert capfd.readouterr().err == f"stopped by SIGTERM; again: sgtm {' '.join(words)}\n"


def test_a_training_that_is_stopped_in_its_dry_run_leaves_nothing(monkeypatch, tmp_path: Path, capfd):
    build(tmp_path / "data", mixed_records())
    from sgtm.training import loop

    words = ["train", "debug", "--runs", str(tmp_path / "runs"), "--data.path", str(tmp_path / "data")]
    words += ["--model.vocab_size", "320"]
    signalled(monkeypatch, loop, "dry_run")
    assert main(words) == 128 + signal.SIGTERM
    assert capfd.readouterr().err.endswith(f"stopped by SIGTERM; again: {shlex.join(['sgtm', *words])}\n")
    assert os.listdir(tmp_path / "runs") == []


@pytest.fixture
def run(tmp_path: Path, monkeypatch) -> Path:
    from sgtm.hf import export

    def no_corpus(*args, **options):
        raise ValueError("no corpus")

    monkeypatch.setattr(export, "open_corpus", no_corpus)
    make_run(tmp_path / "run", GPT_NEO)
    return tmp_path / "run"


@pytest.mark.parametrize("exists", [False, True])
def test_an_export_that_is_stopped_leaves_nothing(monkeypatch, tmp_path: Path, capfd, run: Path, exists: bool):
    from sgtm.hf import export, folder

    out, words = tmp_path / "out", ["export", str(run), "--out", str(tmp_path / "out")]
    if exists:
        out.mkdir()
    with monkeypatch.context() as patch:
        signalled(patch, export, "card")
        assert main(words) == 128 + signal.SIGTERM
    assert capfd.readouterr().err.endswith(f"stopped by SIGTERM; again: sgtm {' '.join(words)}\n")
    assert sorted(os.listdir(tmp_path)) == ["out"] * exists + ["run"] and not (exists and os.listdir(out))
    gone = subprocess.Popen(["true"])
    gone.wait()
    with monkeypatch.context() as patch:  # killed: it does not come to clean up
        patch.setattr(os, "getpid", lambda: gone.pid)
        patch.setattr(folder, "shutil", SimpleNamespace(rmtree=lambda *args, **options: None))
        signalled(patch, export, "card")
        assert main(words) == 128 + signal.SIGTERM
    left = [name for folder in (tmp_path, out) if folder.exists() for name in os.listdir(folder) if "partial" in name]
    assert len(left) == 1
    assert main(words) == 0 and sorted(os.listdir(tmp_path)) == ["out", "run"]
    assert not [name for name in os.listdir(out) if "partial" in name]


def test_a_report_that_is_stopped_keeps_the_one_before(monkeypatch, tmp_path: Path, capfd):
    from sgtm.report import page

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("extends: debug\n")
    assert main(["report", str(run)]) == 0
    before = contents(run)
    step = {"kind": "step", "step": 1, "tokens": 9, "loss": 2.0, "loss/retain": 2.0, "seconds": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    with monkeypatch.context() as patch:
        signalled(patch, page, "draw", after=len(page.EXHIBITS) - 1)
        assert main(["report", str(run)]) == 128 + signal.SIGTERM
    assert capfd.readouterr().err == f"stopped by SIGTERM; again: sgtm report {run}\n"
    assert {name: data for name, data in contents(run).items() if name != "metrics.jsonl"} == before
    assert main(["report", str(run)]) == 0 and contents(run) != before


@pytest.mark.parametrize("phase", ["open_corpora", "train_all", "_write"])
def test_a_sweep_that_is_stopped_outside_its_runs(monkeypatch, tmp_path: Path, capfd, phase: str):
    from sgtm.sweep import run as sweep

    build(tmp_path / "data", mixed_records())
    settings = f"{{data.path: {tmp_path / 'data'}, model.vocab_size: 320}}"
    file = tmp_path / "one.yaml"
    file.write_text(f"base: debug\nruns: {tmp_path}\nset: {settings}\nvariants: {{sgtm: {{}}}}\n")
    if phase == "_write":
        monkeypatch.setattr(sweep, "train_all", lambda *args: SimpleNamespace(failed=[], stopped=None))
    signalled(monkeypatch, sweep, phase, signal.SIGUSR1)
    assert main(["sweep", str(file), "--jobs", "1"]) == 128 + signal.SIGUSR1
    line = f"stopped by SIGUSR1; finished work is kept; continue: sgtm sweep {file} --jobs 1\n"
    assert capfd.readouterr().err == line
