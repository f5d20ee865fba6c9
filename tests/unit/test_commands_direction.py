"""`sgtm direction`: its options, and what it hands on."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from signatures import as_called

from sgtm.commands.main import main
from sgtm.unlearning.mean_difference import direction_of_text

OPTIONS = {"domain": None, "layer": None, "sequences": None, "data": None}


@pytest.fixture
def noted(monkeypatch):
    noted = []

    def measure(*args, **options) -> dict:
        noted.append((args, options))
        return {}

    module = SimpleNamespace(
        direction_of_text=as_called(direction_of_text, measure), described=lambda record: "a table"
    )
    monkeypatch.setitem(sys.modules, "sgtm.unlearning.mean_difference", module)
    return noted


def test_options_are_handed_on(noted, run, capsys, monkeypatch):
    out = run / "es.safetensors"
    monkeypatch.chdir(run)
    (run / "copy").mkdir()
    assert main(["direction", str(run), "--out", str(out)]) == 0
    arguments = ["--domain", "es", "--layer", "0", "--sequences", "7", "--data.path", "copy"]
    assert main(["direction", str(run), "--out", str(out), *arguments]) == 0
    chosen = {"domain": "es", "layer": 0, "sequences": 7, "data": "copy"}
    assert noted == [((run, out), OPTIONS), ((run, out), chosen)]
    assert f"a table\ndone: {out}; next: sgtm train CONFIG --steering.direction {out}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "x", "--layer", "-1"], "--layer: expected a whole number from 0 on, got '-1'"),
        (["--out", "x", "--sequences", "0"], "--sequences: expected a whole number above 0"),
    ],
)
def test_values_that_make_no_sense_are_refused(noted, run, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main(["direction", str(run), *arguments])
    assert exit.value.code == 2 and not noted and message in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused_first(noted, tmp_path, capsys):
    assert main(["direction", str(tmp_path / "no"), "--out", str(tmp_path / "out")]) == 2
    assert not noted and "not a run directory" in capsys.readouterr().err


def test_a_corpus_that_is_gone_is_an_error_first(noted, run, capsys):
    (run / "config.yaml").write_text("extends: debug\ndata: {path: /nowhere/corpus}\n")
    assert main(["direction", str(run), "--out", str(run / "out")]) == 2
    assert not noted and "error: no corpus at /nowhere/corpus: the folder does not exist" in capsys.readouterr().err
