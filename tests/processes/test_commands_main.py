"""The command line as a program: exit status, launchers, pipes, old names; mistakes are in test_commands_errors.py."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sgtm.commands.main import main
from sgtm.commands.main import run as run_process

ROOT = Path(__file__).parents[2]


def test_train_under_the_deepspeed_launcher(calls):
    """It puts --local_rank before everything else."""
    assert main(["--local_rank=1", "train", "debug", "--resume"]) == 0
    assert main(["train", "--local-rank", "0", "debug", "--train.steps", "20"]) == 0
    assert [options["resume"] for _, _, options in calls] == [True, False]
    assert calls[1][1][0].train.steps == 20


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_ends_the_command_without_a_word(unbuffered):
    """Buffered output breaks the pipe at the end, unbuffered in the middle."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "sgtm", "config"],
        cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, stdout=writer, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_training_on_an_unfinished_corpus_says_how_to_finish_it(tmp_path):
    """The rules refuse the second line, so that preparation ends in the middle."""
    (tmp_path / "a.jsonl").write_text('{"text": "x", "category": "en"}\n{"text": "x", "category": "it"}\n')
    (tmp_path / "rules.yaml").write_text("labels: {en: retain}\n")
    out = str(tmp_path / "corpus")
    assert main(["prepare", str(tmp_path / "a.jsonl"), "--rules", str(tmp_path / "rules.yaml"), "--out", out]) == 2
    done = subprocess.run(
        [sys.executable, "-m", "sgtm", "train", "debug", f"--data.path={out}", f"--runs={tmp_path}/runs"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"error: the corpus {out} is not finished" in done.stderr and f"--rules FILE --out {out}" in done.stderr


def test_help_is_instant():
    """No command's modules are imported before it runs; torch alone takes a second, and deepspeed several."""
    code = (
        "import sys; from sgtm.commands.main import main\n"
        "main([]); assert 'torch' not in sys.modules\n"
        "main(['eval', 'x']); print('deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


def test_module_runs_under_torchrun():
    """`-m sgtm` is found, and a mistake is the last thing on the screen; before, it is printed once for both ranks.

    Or not at all, where rank 1 fails so early that torchrun ends rank 0 before it prints.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "sgtm", "train", "debgu"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    printed = [line for line in lines if line.startswith("error: ")]
    assert len(printed) <= 1 and all(line.startswith("error: rank 0: unknown preset 'debgu'") for line in printed)
    assert lines[-2].startswith("  traceback : error: rank ") and "unknown preset 'debgu'" in lines[-2]


def test_the_old_name_of_a_command_works_with_a_note(capsys):
    assert main(["plan", "debug", "--gpus", "2"]) == 0
    shown, note = capsys.readouterr()
    assert note == "note: sgtm plan is now sgtm estimate\n"
    assert main(["estimate", "debug", "--gpus", "2"]) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("environ", [{"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}])
def test_commands_that_write_files_run_as_one_process(environ, run, monkeypatch, capsys):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    for command in (["eval", str(run)], ["export", str(run), "--out", "x"], ["prepare", "a"]):
        assert main(command) == 2
        assert f"sgtm {command[0]} runs as one process; start it without torchrun" in capsys.readouterr().err
    assert main(["config", "debug"]) == main(["estimate", "debug", "--gpus=2"]) == 0


def test_variables_of_unknown_origin_are_no_launcher(calls, run, monkeypatch):
    """Some platforms set them in every shell."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["report", str(run)]) == 0


def test_a_process_ends_as_a_rank_after_it_has_told_its_error(monkeypatch, capsys):
    """Whether the command succeeds, is refused or breaks; `main` itself never ends its caller."""
    ended = []
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # torch's, where a test before has made a process group
    monkeypatch.setitem(sys.modules, "sgtm.distributed.process_group", SimpleNamespace(end_rank=ended.append))
    for train, status in ((lambda *a, **k: None, 0), (_refuse, 2), (_break, 1)):
        monkeypatch.setitem(sys.modules, "sgtm.training.loop", SimpleNamespace(train=train))
        monkeypatch.setattr(sys, "argv", ["sgtm", "train", "debug"])
        assert (run_process(), ended) == (status, [status])
        ended.clear()
    assert capsys.readouterr().err.splitlines()[-1] == "RuntimeError: a bug"
    monkeypatch.setitem(sys.modules, "sgtm.training.loop", SimpleNamespace(train=_refuse))
    assert (main(["train", "debug"]), ended) == (2, [])
    monkeypatch.setenv("SGTM_TRACEBACK", "1")
    assert (run_process(), ended) == (1, [1])
    assert capsys.readouterr().err.splitlines()[-1] == "ValueError: a mistake"


def _refuse(*args, **options):
    raise ValueError("a mistake")


def _break(*args, **options):
    raise RuntimeError("a bug")


def test_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("SGTM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown preset"):
        main(["train", "debgu"])
