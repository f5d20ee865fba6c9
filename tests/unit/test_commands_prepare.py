"""`sgtm prepare`: the options that reach the preparation, and what is missing."""

from pathlib import Path

import pytest

from sgtm.commands.main import main


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
