"""`sgtm unlearn`: its options, as the methods have them, and what it hands on."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from signatures import as_called

from sgtm.commands import unlearn
from sgtm.commands.main import main
from sgtm.unlearning.run import unlearn_run


@pytest.fixture
def noted(monkeypatch):
    noted = []
    note = as_called(unlearn_run, lambda *args, **options: noted.append((args, options)))
    monkeypatch.setitem(sys.modules, "sgtm.unlearning.run", SimpleNamespace(unlearn_run=note))
    return noted


def test_options_are_handed_on(noted, run, capsys, monkeypatch):
    out = run / "out"
    monkeypatch.chdir(run)
    (run / "copy").mkdir()
    arguments = ["--method", "npo", "--out", str(out), "--beta", "0.2", "--retain-weight", "0", "--seed", "4"]
    assert main(["unlearn", str(run), *arguments, "--steps", "9", "--lr", "1e-4", "--data.path", "copy"]) == 0
    options = {"domain": None, "options": {"beta": 0.2, "retain_weight": 0.0}, "steps": 9, "lr": 1e-4}
    assert noted == [((run, "npo", out), {**options, "seed": 4, "data": "copy"})]
    assert f"next: sgtm eval {out}" in capsys.readouterr().out


def test_methods_and_options_are_those_that_there_are():
    from sgtm.unlearning.methods import METHODS

    assert tuple(METHODS) == unlearn.METHODS
    assert set(unlearn.OPTIONS) == {name for method in METHODS.values() for name in method.options} - {"seed"}
    for name, method in METHODS.items():
        for option, value in method.options.items():
            if option in unlearn.OPTIONS and value is not None:
                assert name in unlearn.OPTIONS[option][2] and f"({value:g})" in unlearn.OPTIONS[option][2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "forgetting"], "invalid choice: 'forgetting'"),
        (["--method", "npo", "--beta", "0"], "--beta: expected a number above 0"),
        (["--method", "rmu", "--layer", "-1"], "--layer: expected a whole number from 0 on, got '-1'"),
        (["--method", "simnpo", "--gamma", "nan"], "--gamma: expected a number from 0 on, got 'nan'"),
        (["--method", "npo", "--steps", "0"], "--steps: expected a whole number above 0"),
    ],
)
def test_values_that_make_no_sense_are_refused(noted, run, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main(["unlearn", str(run), "--out", str(run / "out"), *arguments])
    assert exit.value.code == 2 and not noted and message in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused_first(noted, tmp_path, capsys):
    assert main(["unlearn", str(tmp_path / "no"), "--method", "npo", "--out", str(tmp_path / "out")]) == 2
    assert not noted and "not a run directory" in capsys.readouterr().err


def test_a_corpus_that_is_gone_is_an_error_first(noted, run, capsys):
    (run / "config.yaml").write_text("extends: debug\ndata: {path: /nowhere/corpus}\n")
    assert main(["unlearn", str(run), "--method", "npo", "--out", str(run / "out")]) == 2
    assert not noted and "error: no corpus at /nowhere/corpus: the folder does not exist" in capsys.readouterr().err
