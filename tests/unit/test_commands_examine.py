"""`sgtm examine`: its options, what it hands on, and a file of passages that has none."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpora import build, record
from signatures import as_called

from sgtm.commands.main import main
from sgtm.report import examination
from sgtm.run import examine as module


@pytest.fixture
def calls(monkeypatch) -> list:
    """What `examine_run`, `write_examination` and `print_examination` are called with."""
    calls: list = []

    def examine_run(run, **options):
        options.pop("log")
        calls.append((run, options))
        return {"domains": {}}

    def write_examination(*values):
        calls.append(values)
        return ["probes", "context"]

    monkeypatch.setattr(module, "examine_run", as_called(module.examine_run, examine_run))
    monkeypatch.setattr(module, "write_examination", as_called(module.write_examination, write_examination))
    monkeypatch.setattr(examination, "print_examination", lambda *values: calls.append(values))
    return calls


@pytest.fixture
def corpus(run, monkeypatch) -> Path:
    """Of the run, whose config is in the working directory."""
    monkeypatch.chdir(run)
    (run / "config.yaml").write_text("extends: debug\ndata: {path: corpus}\n")
    build(run / "corpus", [record(0), record(1, split="test")])
    return run / "corpus"


def test_options_are_handed_on(calls, corpus, tmp_path, capsys):
    texts, results = tmp_path / "texts.txt", {"domains": {}}
    (tmp_path / "filtered").mkdir()
    (tmp_path / "filtered/config.yaml").write_text("extends: debug\n")
    corpus.rename("copy")
    texts.write_text("one\n\ntwo\n")
    options = ["--only", "recital", "guided", "--against", "filtered", "--sequences", "9", "--passages", "3"]
    options += ["--fit-sequences", "7", "--texts", str(texts)]
    assert main(["examine", str(tmp_path), *options, "--data.path", "copy"]) == 0
    (run, keys), written, printed = calls
    assert run == tmp_path and written == (tmp_path, results) and printed == (results,)
    assert keys.pop("control").name == "filtered" and keys.pop("measures") == ["recital", "guided"]
    numbers = {"sequences": 9, "passages": 3, "fit_sequences": 7}
    assert keys == {"split": "test", **numbers, "texts": ["one", "two"], "data": "copy"}
    assert f"removed from {tmp_path}: probes, context, of other weights" in capsys.readouterr().err


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
