"""`sgtm train`: the config and the options that the training gets, and which run is resumed."""

from pathlib import Path

import pytest

from sgtm.commands.main import main
from sgtm.config import Config
from sgtm.config.load import load_config, save_config
from sgtm.config.reference import keys


def test_train_takes_overrides_anywhere(calls, capsys):
    assert main(["train", "--train.steps", "30", "debug", "--overwrite", "--name=mine"]) == 0
    ((function, (config,), options),) = calls
    assert (function, config.train.steps, config.name) == ("train", 30, "mine")
    assert options == {"resume": False, "overwrite": True}
    assert capsys.readouterr().out.startswith("next: sgtm eval ")


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
    message = capsys.readouterr().err
    assert message.startswith(f"error: {file} is a file, neither a run directory nor a config (")
    assert message.endswith("put the run back there\n") and message.count("\n") == 1
    file.write_text("extends: debug\n")  # a config may have any name
    assert main(["train", str(file), "--resume", "auto"]) == 0


NO_RUN = "not a run directory (no config.yaml in it); runs here: runs/small"


@pytest.mark.parametrize(
    ("name", "problem"), [("runs/smal", NO_RUN), ("smal", "unknown preset 'smal'"), ("small", NO_RUN)]
)
def test_resuming_a_run_that_is_not_there_names_those_that_are(calls, tmp_path, monkeypatch, capsys, name, problem):
    monkeypatch.chdir(tmp_path)
    Path("runs/small").mkdir(parents=True)
    save_config(load_config("debug"), "runs/small/config.yaml")
    assert main(["train", name, "--resume"]) == 2
    assert problem in capsys.readouterr().err
    assert main(["train", "small"]) == 2
    message = "no preset or file small; runs/small is a run directory: sgtm train runs/small --resume"
    assert capsys.readouterr().err == f"error: {message}\n" and not calls


def test_a_preset_is_not_taken_for_a_directory_of_its_name(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("debug").mkdir()
    assert main(["train", "debug"]) == 0
    assert calls[0][1][0].runs == "runs"


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
