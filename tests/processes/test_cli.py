"""The command line: what each command calls and prints; mistakes are in test_cli_errors.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sgtm.commands.main import main
from sgtm.config import Config
from sgtm.config.load import load_config, save_config
from sgtm.config.reference import keys

ROOT = Path(__file__).parents[2]


@pytest.fixture
def calls(monkeypatch):
    """The functions behind the commands, replaced by ones that note their arguments."""
    noted = []

    def module(name, **results):
        def noting(function, result):
            def note(*args, **options):
                noted.append((function, args, options))
                return result

            return note

        functions = {function: noting(function, result) for function, result in results.items()}
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**functions))

    module("sgtm.training.loop", train=Path("runs/quickstart"))
    module("sgtm.run.evaluate", evaluate_run={"losses": {}}, write_summary=None)
    module("sgtm.hf.export", export_run=None)
    monkeypatch.setattr(
        "sgtm.report.write_report", lambda *args: noted.append(("write_report", args, {})) or args[0] / "x.html"
    )
    monkeypatch.setattr("sgtm.report.print_summary", lambda summary: noted.append(("print_summary", (summary,), {})))
    return noted


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text("extends: debug\n")
    return tmp_path


def test_train_takes_overrides_anywhere(calls):
    assert main(["train", "--train.steps", "30", "debug", "--overwrite", "--name=mine"]) == 0
    ((function, (config,), options),) = calls
    assert (function, config.train.steps, config.name) == ("train", 30, "mine")
    assert options == {"resume": False, "overwrite": True}


def test_a_run_is_resumed_by_its_directory(calls, tmp_path, capsys):
    """With the settings it was made with, wherever it lies now; without --resume it is not trained over."""
    run = tmp_path / "moved" / "mine"
    run.mkdir(parents=True)
    save_config(load_config("debug", ["--name=old", "--runs=elsewhere", "--train.steps=30"]), run / "config.yaml")
    assert main(["train", f"{run}/", "--resume", "--train.log_every", "7"]) == 0
    ((_, (config,), options),) = calls
    assert (config.runs, config.name) == (str(run.parent), "mine")
    assert (config.train.steps, config.train.log_every, options["resume"]) == (30, 7, True)
    assert main(["train", str(run)]) == 2
    assert capsys.readouterr().err == f"error: {run} is a run directory; resume it: sgtm train {run} --resume\n"
    assert main(["train", str(tmp_path), "--resume"]) == 2
    assert "not a run directory (no config.yaml in it)" in capsys.readouterr().err
    assert len(calls) == 1


@pytest.mark.parametrize("content", [b"", b"\0" * 100], ids=["nothing", "zeros"])
def test_an_empty_config_of_a_run_names_the_remedy(calls, tmp_path, capsys, content):
    run = tmp_path / "mine"
    for step in (2, 10):
        (run / f"checkpoints/step_{step:08d}").mkdir(parents=True)
        (run / f"checkpoints/step_{step:08d}/manifest.json").touch()
    (run / "config.yaml").write_bytes(content)
    for command in (["train", str(run), "--resume", "auto"], ["eval", str(run)]):
        assert main(command) == 2 and not calls
        assert capsys.readouterr().err == (
            f"error: {run}/config.yaml is empty; put back a copy of it (its values are in "
            f"{run}/checkpoints/step_00000010/manifest.json, under config), or resume with what the run was made from: "
            f"sgtm train PRESET|FILE --runs {tmp_path} --name mine --resume\n"
        )


@pytest.mark.parametrize("content", ["", "of no run", "a: 1\nb: 2"])
def test_a_file_in_the_place_of_a_run_is_said(calls, tmp_path, capsys, content):
    (file := tmp_path / "mine").write_text(content)
    assert main(["train", str(file), "--resume", "auto"]) == 2 and not calls
    said = capsys.readouterr().err
    assert said.startswith(f"error: {file} is a file, neither a run directory nor a config (")
    assert said.endswith("put the run back there\n") and said.count("\n") == 1
    file.write_text("extends: debug\n")  # a config may have any name
    assert main(["train", str(file), "--resume", "auto"]) == 0


def test_runs_are_named_wherever_they_are(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        save_config(load_config("debug"), tmp_path / "runs" / name / "config.yaml")
    cases = {
        tmp_path: "runs",
        tmp_path / "runs": "nope",
        tmp_path / "runs/a": "../nope",
        Path("/"): tmp_path / "runs/x",
    }
    for folder, wanted in cases.items():
        monkeypatch.chdir(folder)
        assert main(["eval", str(wanted)]) == 2
        beside = Path(wanted) if folder == tmp_path else Path(wanted).parent
        assert f"runs here: {beside / 'a'}, {beside / 'b'}\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["runs/smal", "smal", "small"])
def test_resuming_a_run_that_is_not_there_names_those_that_are(calls, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    Path("runs/small").mkdir(parents=True)
    save_config(load_config("debug"), "runs/small/config.yaml")
    assert main(["train", name, "--resume"]) == 2
    known = "" if name == "smal" else "not a run directory (no config.yaml in it); runs here: runs/small"
    assert (known or "unknown preset 'smal'") in capsys.readouterr().err


def test_a_preset_is_not_taken_for_a_directory_of_its_name(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("debug").mkdir()
    assert main(["train", "debug"]) == 0
    assert calls[0][1][0].runs == "runs"


def test_train_under_the_deepspeed_launcher(calls):
    """It puts --local_rank before everything else."""
    assert main(["--local_rank=1", "train", "debug", "--resume"]) == 0
    assert main(["train", "--local-rank", "0", "debug", "--train.steps", "20"]) == 0
    assert [options["resume"] for _, _, options in calls] == [True, False]
    assert calls[1][1][0].train.steps == 20


def test_quickstart_trains_evaluates_reports_and_prints(calls, capsys, tmp_path):
    assert main(["quickstart", "--train.steps", "60", "--runs", str(tmp_path)]) == 0
    stages = ["train", "evaluate_run", "write_summary", "print_summary", "write_report"]
    assert [function for function, _, _ in calls] == stages
    assert calls[0][1][0].name == "quickstart" and calls[0][1][0].train.steps == 60
    assert "report: runs/quickstart/x.html" in capsys.readouterr().out


def test_quickstart_prints_and_stores_the_shipped_baselines(calls, tmp_path):
    from sgtm.report.baselines import shipped_baselines

    baselines = shipped_baselines(load_config("quickstart"))
    assert main(["quickstart", "--runs", str(tmp_path)]) == 0
    summaries = {function: args[-1] for function, args, _ in calls if "summary" in function}
    assert list(baselines) == ["unmasked", "filtered"]
    assert summaries == {key: {"losses": {}, "baselines": baselines} for key in ("write_summary", "print_summary")}


@pytest.mark.parametrize(("stored", "overwrite"), [("quickstart", True), ("novels", False), (None, False)])
def test_quickstart_replaces_a_quickstart_and_nobodys_work(calls, tmp_path, capsys, stored, overwrite):
    name = stored or "novels"
    if stored:
        (tmp_path / name).mkdir()
        save_config(load_config("quickstart", ["--name", stored]), tmp_path / name / "config.yaml")
    refused = stored == "novels"
    assert main(["quickstart", "--name", name, "--runs", str(tmp_path)]) == (2 if refused else 0)
    assert (f"run directory {tmp_path / name} exists" in capsys.readouterr().err) == refused
    assert [options for _, _, options in calls[:1]] == ([] if refused else [{"overwrite": overwrite}])


def test_commands_on_a_run(calls, run, tmp_path):
    assert main(["eval", str(run), "--sequences", "8"]) == 0
    assert calls[0] == ("evaluate_run", (run,), {"split": "test", "sequences": 8, "data": None})
    assert calls[1:] == [("write_summary", (run, {"losses": {}}), {}), ("print_summary", ({"losses": {}},), {})]
    where = ["--out", str(tmp_path / "out"), "--data.path", "copy"]
    assert main(["export", str(run), "--remove", "es", *where]) == 0
    assert calls[3] == ("export_run", (run, ["es"], tmp_path / "out", "copy"), {})
    for remove in (["bio,med"], ["bio", "med"], ["bio,", "med"]):
        assert main(["export", str(run), "--remove", *remove, "--out", str(tmp_path / "out")]) == 0
        assert calls.pop()[1][1] == ["bio", "med"]
    assert main(["report", str(run)]) == 0
    assert calls[4] == ("write_report", (run, None), {})


def test_a_report_with_a_baseline_compares_before_it_writes(calls, run, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(run / "config.yaml", other)
    assert main(["report", str(run), "--baseline", str(other)]) == 2
    assert "was not evaluated: " in capsys.readouterr().err and not calls
    assert main(["report", str(run), "--baseline", str(tmp_path / "no")]) == 2
    assert f"{tmp_path / 'no'}: not a run directory" in capsys.readouterr().err and not calls
    monkeypatch.setattr("sgtm.report.compare", lambda run, others: ("compared", others))
    monkeypatch.setattr("sgtm.report.print_comparison", lambda comparison: calls.append(comparison))
    assert main(["report", str(run), "--baseline", str(other)]) == 0
    assert calls == [comparison := ("compared", [other]), ("write_report", (run, comparison), {})]


def test_losses_that_cannot_be_stored_are_printed_all_the_same(calls, run, monkeypatch, capsys):
    def full(run, summary):
        raise OSError(30, "Read-only file system", str(run / "summary.json"))

    sys.modules["sgtm.run.evaluate"].write_summary = full
    assert main(["eval", str(run)]) == 2
    assert calls[1:] == [("print_summary", ({"losses": {}},), {})]
    assert capsys.readouterr().err == f"error: {run}/summary.json: Read-only file system\n"


@pytest.mark.parametrize("number", ["0", "-4", "many"])
def test_evaluation_takes_a_positive_number_of_sequences(calls, run, capsys, number):
    with pytest.raises(SystemExit) as exit:
        main(["eval", str(run), f"--sequences={number}"])
    assert exit.value.code == 2 and not calls
    assert f"argument --sequences: expected a whole number above 0, got '{number}'" in capsys.readouterr().err


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


def test_prepare_passes_its_options(monkeypatch):
    noted = []
    monkeypatch.setattr("sgtm.data.prepare.run_prepare", noted.append)
    arguments = "prepare a.jsonl b --rules r.yaml --out corpus --vocab-size 300 --overwrite"
    assert main(arguments.split()) == 0
    (options,) = noted
    assert tuple(options.sources) == (Path("a.jsonl"), Path("b"))
    assert (options.rules, options.out, options.vocab_size) == (Path("r.yaml"), Path("corpus"), 300)
    assert options.overwrite


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ([], "no DATA, no --rules, no --out"),
        (["a.txt", "--out", "x"], "no --rules"),
        (["--rules", "r", "--out", "x"], "no DATA"),
    ],
)
def test_prepare_says_what_it_needs_and_reads(arguments, missing, capsys):
    assert main(["prepare", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: sgtm prepare: {missing}; write: sgtm prepare DATA... --rules FILE --out FOLDER")
    for known in (".txt, .jsonl, ", ".csv, .tsv (plain, .gz, ", ".parquet or a saved Hugging Face dataset"):
        assert known in message and "╭" not in message


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


def test_config_prints_presets_and_a_whole_config(capsys):
    assert main(["config"]) == 0
    assert "tinystories-64m" in capsys.readouterr().out.splitlines()
    assert main(["config", "debug", "--train.steps", "77"]) == 0
    assert "  steps: 77\n" in capsys.readouterr().out


def test_train_help_lists_the_keys_with_their_meaning(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", "--help"])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert "PRESET|FILE.yaml|RUN" in printed
    assert "--optimizer.masked_update  one of exact, zero_grad [exact]" in printed
    words = " ".join(printed.split())
    for key in keys(Config):
        assert key.doc and f"--{key.name} {key.takes}{f' [{key.default}]' if key.default else ''} {key.doc}" in words, (
            key
        )


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


def test_the_old_name_of_a_backend_works_with_a_note(capsys, monkeypatch):
    from sgtm_kernels import _note_renamed

    _note_renamed.cache_clear()
    for _ in range(2):
        assert load_config("debug", ["--kernels.backend=runs"]).kernels.backend == "torch"
    assert capsys.readouterr().err == "note: kernel backend 'runs' is now 'torch'\n"


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
