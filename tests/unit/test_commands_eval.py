"""`sgtm eval`: what is evaluated, stored and printed, and which runs there are."""

import sys
from pathlib import Path

import pytest

from sgtm.commands.main import main
from sgtm.config.load import load_config, save_config


def test_the_losses_of_a_run_are_stored_and_printed(calls, run):
    assert main(["eval", str(run), "--sequences", "8"]) == 0
    assert calls[0] == ("evaluate_run", (run,), {"split": "test", "sequences": 8, "data": None})
    assert calls[1:] == [("write_summary", (run, {"losses": {}}), {}), ("print_summary", ({"losses": {}},), {})]


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


def test_another_strength_is_stored_beside_the_losses_of_the_run(calls, run):
    options = {"split": "test", "sequences": None, "data": None}
    for steer, name in (
        ("-1.5", "summary-steer-1.5.json"),
        ("0", "summary-steer+0.json"),
        ("2", "summary-steer+2.json"),
    ):
        calls.clear()
        assert main(["eval", str(run), "--steer", steer]) == 0
        assert calls[0] == ("evaluate_run", (run,), options | {"steer": float(steer)})
        assert calls[1] == ("write_summary", (run, {"losses": {}}, name), {})


def test_sets_and_strengths_are_added(calls, run):
    options = ["--remove", "a", "b", "--remove", "c", "--strength", "a=0.5", "b=1", "--strength=a=0"]
    assert main(["eval", str(run), *options]) == 0
    (_, _, taken), *_ = calls
    assert taken["remove"] == [["a", "b"], ["c"]]
    assert taken["strengths"] == [{"a": 0.5, "b": 1.0}, {"a": 0.0}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("es", "expected DOMAIN=S, such as bio=0.5, got 'es'"),
        ("=1", "expected DOMAIN=S, such as bio=0.5, got '=1'"),
        ("es=2", "expected a strength from 0 to 1, got 'es=2'"),
        ("es=much", "expected a number, got 'much'"),
    ],
)
def test_a_strength_of_a_domain_is_a_share(calls, run, capsys, text, message):
    with pytest.raises(SystemExit) as exit:
        main(["eval", str(run), "--strength", text])
    assert exit.value.code == 2 and not calls and f"argument --strength: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["nan", "inf", "much"])
def test_a_strength_is_a_number(calls, run, capsys, number):
    with pytest.raises(SystemExit) as exit:
        main(["eval", str(run), f"--steer={number}"])
    assert exit.value.code == 2 and not calls
    assert f"argument --steer: expected a number, got '{number}'" in capsys.readouterr().err
