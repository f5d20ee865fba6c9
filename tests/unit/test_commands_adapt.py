"""`sgtm adapt`: its options and their defaults, and what it hands on."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace

import pytest
from signatures import as_called

from sgtm.commands.main import main
from sgtm.unlearning.adapt import adapt_run


@pytest.fixture
def noted(monkeypatch):
    noted = []
    note = as_called(adapt_run, lambda *args, **options: noted.append((args, options)))
    monkeypatch.setitem(sys.modules, "sgtm.unlearning.adapt", SimpleNamespace(adapt_run=note))
    return noted


def test_options_are_handed_on(noted, run, capsys, monkeypatch):
    out = run / "out"
    monkeypatch.chdir(run)
    (run / "copy").mkdir()
    arguments = ["--domain", "es", "--rank", "4", "--alpha", "8", "--steps", "9", "--lr", "1e-4", "--seed", "5"]
    more = ["--retain-weight", "0", "--data.path", "copy"]
    assert main(["adapt", str(run), "--out", str(out), *arguments, *more]) == 0
    options = {"domain": "es", "rank": 4, "alpha": 8.0, "retain_weight": 0.0, "steps": 9, "lr": 1e-4}
    assert noted == [((run, out), {**options, "seed": 5, "data": "copy"})]
    assert f"next: sgtm eval {out}" in capsys.readouterr().out


def test_defaults_are_those_of_the_function(run, monkeypatch):
    from sgtm.unlearning import adapt

    noted, defaults = [], inspect.signature(adapt.adapt_run).parameters
    monkeypatch.setattr(adapt, "adapt_run", lambda *args, **options: noted.append(options))
    assert main(["adapt", str(run), "--out", str(run / "out")]) == 0
    assert noted == [{name: defaults[name].default for name in noted[0]}] and len(noted[0]) == len(defaults) - 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "-1"], "--rank: expected a whole number from 0 on, got '-1'"),
        (["--alpha", "0"], "--alpha: expected a number above 0"),
        (["--retain-weight", "nan"], "--retain-weight: expected a number from 0 on, got 'nan'"),
        (["--steps", "0"], "--steps: expected a whole number above 0"),
    ],
)
def test_values_that_make_no_sense_are_refused(noted, run, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main(["adapt", str(run), "--out", str(run / "out"), *arguments])
    assert exit.value.code == 2 and not noted and message in capsys.readouterr().err


def test_a_corpus_that_is_gone_is_an_error_first(noted, run, capsys):
    (run / "config.yaml").write_text("extends: debug\ndata: {path: /nowhere/corpus}\n")
    assert main(["adapt", str(run), "--out", str(run / "out")]) == 2
    assert not noted and "error: no corpus at /nowhere/corpus: the folder does not exist" in capsys.readouterr().err
