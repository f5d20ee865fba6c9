"""`sgtm examine`: its options, what it hands on, and a file of passages that has none."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from sgtm.commands.main import main


@pytest.fixture
def calls(monkeypatch) -> list:
    """What `examine_run`, `write_examination` and `print_examination` are called with."""
    calls: list = []

    def examine_run(run, **options):
        options.pop("log")
        calls.append((run, options))
        return {"domains": {}}

    module = SimpleNamespace(examine_run=examine_run, write_examination=lambda *values: calls.append(values))
    monkeypatch.setitem(sys.modules, "sgtm.run.examine", module)
    report = SimpleNamespace(print_examination=lambda *values: calls.append(values))
    monkeypatch.setitem(sys.modules, "sgtm.report.examination", report)
    return calls


def test_options_are_handed_on(calls, tmp_path):
    texts, results = tmp_path / "texts.txt", {"domains": {}}
    texts.write_text("one\n\ntwo\n")
    options = ["--only", "recital", "guided", "--against", "runs/filtered", "--sequences", "9", "--passages", "3"]
    assert main(["examine", str(tmp_path), *options, "--texts", str(texts), "--data.path", "copy"]) == 0
    (run, keys), written, printed = calls
    assert run == tmp_path and written == (tmp_path, results) and printed == (results,)
    assert keys.pop("control").name == "filtered" and keys.pop("measures") == ["recital", "guided"]
    assert keys == {"split": "test", "sequences": 9, "texts": ["one", "two"], "passages": 3, "data": "copy"}


def test_a_file_without_passages_is_an_error(calls, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert main(["examine", str(tmp_path), "--texts", str(tmp_path / "empty.txt")]) == 2
    assert "empty.txt has no line of text: one passage a line is expected" in capsys.readouterr().err
    assert calls == []
