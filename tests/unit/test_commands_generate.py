"""`sgtm generate`: a column for each model, the same text for a seed, and mistakes before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from text_models import byte_run

from sgtm.commands.main import main
from sgtm.hf.export import export_run
from sgtm.inference.decoding import Sampling, complete
from sgtm.inference.sources import find_model
from sgtm.inference.text_model import open_models
from sgtm.report import completions as report


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    export_run(byte_run(folder), ["es"], folder / "safe")
    return folder


@pytest.fixture
def shown(folder, monkeypatch):
    """Columns of the last call."""
    monkeypatch.chdir(folder)
    columns: dict = {}
    original = report.print_completions

    def record(prompt, completions):
        columns.clear()
        columns.update(completions, prompt=prompt)
        original(prompt, completions)

    monkeypatch.setattr(report, "print_completions", record)
    return columns


def test_the_full_model_stands_beside_that_without_the_domains(shown, capsys):
    assert main(["generate", "run", "--prompt", "El", "--remove", "fr,es", "--tokens", "5"]) == 0
    assert list(shown) == ["full", "without es,fr", "prompt"]
    models = open_models(find_model(Path("run")), [(), ("es", "fr")])
    assert [shown[model.name] for model in models] == [complete(model, "El", 5) for model in models]
    assert shown["full"] != shown["without es,fr"]
    assert re.search(r"^full +without es,fr", capsys.readouterr().out)


def test_exports_and_runs_are_columns_too(shown):
    assert main(["generate", "run", "safe", "--prompt", "El", "--tokens", "5", "--remove", "es"]) == 0
    assert list(shown) == ["run", "run without es", "safe", "prompt"]
    assert shown["safe"] == shown["run without es"]
    assert main(["generate", "safe", "--prompt", "El", "--tokens", "5"]) == 0
    assert list(shown) == ["safe", "prompt"]
    assert main(["generate", "run", "--prompt", "El"]) == 0
    assert list(shown) == ["full", "prompt"]


def test_a_seed_gives_the_same_text(shown):
    command = ["generate", "run", "--prompt", "El", "--tokens", "9", "--temperature", "2", "--top-k", "40", "--seed"]
    texts = []
    for seed in ("5", "5", "6"):
        assert main([*command, seed]) == 0
        texts.append(shown["full"])
    assert texts[0] == texts[1] != texts[2]
    (model,) = open_models(find_model(Path("run")))
    assert texts[0] == complete(model, "El", 9, Sampling(2.0, 40, 5))


def test_a_prompt_comes_from_a_file_without_its_last_line_end(shown, tmp_path, capsys):
    file = tmp_path / "prompt.txt"
    file.write_text("El\n\n")
    assert main(["generate", "run", "--prompt-file", str(file), "--tokens", "1"]) == 0
    assert shown["prompt"] == "El\n"
    file.write_bytes(b"a\xff")
    assert main(["generate", "run", "--prompt-file", str(file)]) == 2
    assert "prompt.txt: not UTF-8 at byte 1; save the file as UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--prompt", "x" * 16], "the prompt has 16 tokens, and the context of full holds 16"),
        (["run", "--prompt", ""], "the prompt is empty"),
        (["run", "--prompt", "a", "--remove", "it"], "unknown domain 'it'; known domains: es, fr"),
        (["safe", "--prompt", "a", "--remove", "es"], "safe is an exported folder, of which es cannot be removed"),
        (["none", "--prompt", "a"], "none: not a run directory"),
        (["run", "--prompt", "a", "--top-k", "3"], "--top-k 3 draws tokens, and --temperature 0 draws none"),
    ],
)
def test_mistakes(shown, capsys, words, message):
    assert main(["generate", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out and not shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "one of the arguments --prompt --prompt-file is required"),
        (["run", "--prompt", "a", "--prompt-file", "b"], "not allowed with argument"),
        (["run", "--prompt", "a", "--temperature", "-1"], "expected a number from 0 on, got '-1'"),
        (["run", "--prompt", "a", "--tokens", "0"], "expected a whole number above 0, got '0'"),
    ],
)
def test_options_that_do_not_fit(capsys, words, message):
    with pytest.raises(SystemExit):
        main(["generate", *words])
    assert message in capsys.readouterr().err
