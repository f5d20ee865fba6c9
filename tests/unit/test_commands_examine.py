"""`sgtm examine`: its options, what it hands on, and a file of passages that has none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from corpora import build, record

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


@pytest.fixture
def corpus(run, monkeypatch) -> Path:
    """Of the run, whose config is in the working directory."""
    monkeypatch.chdir(run)
    (run / "config.yaml").write_text("extends: debug\ndata: {path: corpus}\n")
    build(run / "corpus", [record(0), record(1, split="test")])
    return run / "corpus"


def test_options_are_handed_on(calls, corpus, tmp_path):
    texts, results = tmp_path / "texts.txt", {"domains": {}}
    (tmp_path / "filtered").mkdir()
    (tmp_path / "filtered/config.yaml").write_text("extends: debug\n")
    corpus.rename("copy")
    texts.write_text("one\n\ntwo\n")
    options = ["--only", "recital", "guided", "--against", "filtered", "--sequences", "9", "--passages", "3"]
    assert main(["examine", str(tmp_path), *options, "--texts", str(texts), "--data.path", "copy"]) == 0
    (run, keys), written, printed = calls
    assert run == tmp_path and written == (tmp_path, results) and printed == (results,)
    assert keys.pop("control").name == "filtered" and keys.pop("measures") == ["recital", "guided"]
    assert keys == {"split": "test", "sequences": 9, "texts": ["one", "two"], "passages": 3, "data": "copy"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n\n", "texts.txt has no line of text: one passage a line is expected"),
        (b"a\n\xff", "texts.txt: not UTF-8 at byte 2; save the file as UTF-8"),
        (None, "texts.txt: No such file or directory"),
    ],
)
def test_a_file_without_passages_is_an_error(calls, corpus, content, message, capsys):
    if content is not None:
        Path("texts.txt").write_bytes(content)
    assert main(["examine", ".", "--texts", "texts.txt"]) == 2
    assert message in capsys.readouterr().err and calls == []


def test_run_control_data_and_split_are_looked_for_first(calls, corpus, capsys):
    for options, message in (
        (["--split", "tset"], "no split 'tset' (did you mean test?); its splits are"),
        (["--against", "none"], "none: not a run directory"),
        (["--data.path", "gone"], "no corpus at gone: the folder does not exist; restore it, or give the folder"),
    ):
        assert main(["examine", ".", *options]) == 2
        assert message in capsys.readouterr().err and calls == []
