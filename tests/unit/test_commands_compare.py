"""`sgtm compare`: which two models it reads the documents with, what it writes, and mistakes before anything loads."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpora import write_jsonl
from pages import Page
from text_models import byte_run

from sgtm.commands.main import main
from sgtm.hf.export import export_run
from sgtm.inference.comparison import compare_models
from sgtm.inference.sources import find_model
from sgtm.inference.text_losses import read_texts
from sgtm.inference.text_model import open_models
from sgtm.report import compared_text

TEXTS = [{"text": "El gato come pan."}, {"text": "The cat eats bread, and more of it."}, {"text": ""}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    export_run(byte_run(folder), ["es"], folder / "safe")
    byte_run(folder, name="other", seed=1)
    write_jsonl(folder / "texts.jsonl", TEXTS)
    return folder


@pytest.fixture
def shown(folder, monkeypatch):
    """Comparisons that were printed."""
    monkeypatch.chdir(folder)
    comparisons: list = []
    original = compared_text.print_comparison_of_texts
    record = lambda comparison: (comparisons.append(comparison), original(comparison))  # noqa: E731
    monkeypatch.setattr(compared_text, "print_comparison_of_texts", record)
    return comparisons


def test_a_run_is_compared_with_itself_without_domains(shown, capsys, tmp_path):
    out = tmp_path / "out.html"
    assert main(["compare", "run", "--remove", "es", "--data", "texts.jsonl", "--html", str(out)]) == 0
    models = open_models(find_model(Path("run")), [(), ("es",)])
    assert shown == [compare_models(*models, read_texts("texts.jsonl"))]
    assert shown[0].names == ("full", "without es") and abs(shown[0].difference.sum) > 1
    printed = capsys.readouterr().out
    assert printed.endswith(f"{out}\n") and "El gato come pan." in printed
    assert [row[0] for row in Page(out).rows] == ["loss", "full", "without es", "difference"]


def test_the_run_without_a_domain_has_the_losses_of_its_export(shown):
    assert main(["compare", "safe", "run", "--remove", "es", "--data", "texts.jsonl", "--show", "0"]) == 0
    (comparison,) = shown
    assert comparison.names == ("safe", "run without es") and comparison.passages == []
    assert abs(comparison.difference.mean.value) < 2e-5 * comparison.first.mean.value
    assert main(["compare", "run", "run", "--remove", "es", "--data", "texts.jsonl"]) == 0
    assert shown[1].second.mean.value == comparison.second.mean.value


def test_two_runs(shown):
    assert main(["compare", "run", "other", "--data", "texts.jsonl", "--show", "1"]) == 0
    (comparison,) = shown
    assert comparison.names == ("run", "other") and len(comparison.passages) == 1
    models = [open_models(find_model(Path(name)))[0] for name in ("run", "other")]
    models[0].name, models[1].name = "run", "other"
    assert comparison == compare_models(*models, read_texts("texts.jsonl"), 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--data", "texts.jsonl"], "run is compared with nothing: give a second model, or --remove DOMAIN"),
        (["run", "./run", "--data", "texts.jsonl"], "run is compared with itself: give another model, or --remove"),
        (["run", "--remove", "it", "--data", "texts.jsonl"], "unknown domain 'it'; known domains: es, fr"),
        (["run", "safe", "--remove", "es", "--data", "texts.jsonl"], "safe is an exported folder, of which es cannot"),
        (["run", "none", "--data", "texts.jsonl"], "none: not a run directory"),
        (["run", "--remove", "es", "--data", "no.txt"], "no such file or folder: no.txt"),
        (["run", "--remove", "es", "--data", "safe/config.json", "--html", "no/o.html"], "there is no folder no; make"),
        (["run", "--remove", "es", "--data", "texts.jsonl", "--html", "texts.jsonl"], "texts.jsonl would change"),
        (["run", "safe", "--data", "texts.jsonl", "--html", "safe/README.md"], "--html safe/README.md would change"),
        (["run", "--remove", "es", "--data", "safe/config.json"], "no field 'text'"),
    ],
)
def test_mistakes(shown, capsys, words, message):
    assert main(["compare", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out and not shown
