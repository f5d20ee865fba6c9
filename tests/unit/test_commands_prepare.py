"""`sgtm prepare`: the options that reach the preparation, and what is missing."""

from pathlib import Path

import pytest

from sgtm.commands.main import main
from sgtm.data.prepare import PrepareOptions


def test_prepare_passes_its_options(monkeypatch):
    noted = []
    monkeypatch.setattr("sgtm.data.prepare.run_prepare", noted.append)
    required = "prepare a.jsonl b --rules r.yaml --out corpus"
    more = "--tokenizer folder --vocab-size 300 --workers 0 --shard-tokens 99 --overwrite"
    assert main(required.split()) == main(f"{required} {more}".split()) == 0
    paths = [Path("a.jsonl"), Path("b")], Path("r.yaml"), Path("corpus")
    assert noted == [PrepareOptions(*paths), PrepareOptions(*paths, "folder", 300, 0, 99, True)]


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
