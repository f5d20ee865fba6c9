"""From a run to an unlearned run: what is refused, what is written, and that other commands take it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from corpora import build, record
from exports import GPT_NEO, make_run

from sgtm.config import load_config
from sgtm.data.store import Corpus
from sgtm.distributed.storage import stored_weights
from sgtm.evaluation.losses import evaluate
from sgtm.files import sha256_of
from sgtm.run.checkpoint import find_latest, read_manifest, verify
from sgtm.run.evaluate import evaluate_run, load_run_model
from sgtm.run.metrics import read_metrics
from sgtm.run.unlearned import read_unlearned
from sgtm.unlearning import derived
from sgtm.unlearning import run as unlearning
from sgtm.unlearning.run import unlearn_run

LABELS = {"en": "retain", "es": "forget:es", "fr": "forget:fr"}


def records(spanish: str = "es", french_split: str = "test") -> list[dict]:
    """Documents whose Spanish ones begin with a word."""
    common = [record(n, "en", 60, split) for n in range(6) for split in ("train", "test")]
    forget = [
        {**record(n, "es", 60, split), "text": f"{spanish}{n}{split}".ljust(60, "-")}
        for n in range(6)
        for split in ("train", "test")
    ]
    return [*common, *forget, record(0, "fr", 60, french_split)]


def trained(folder: Path, spanish: str = "es") -> Path:
    """A run with random weights, and its corpus beside it."""
    folder.mkdir()
    corpus = build(folder / "corpus", records(spanish), LABELS)
    text = f"{GPT_NEO}optimizer: {{lr: 0.03}}\ndata: {{path: {folder / 'corpus'}}}\n"
    make_run(folder / "run", text, corpus.fingerprint)
    return folder / "run"


@pytest.fixture(scope="module", autouse=True)
def no_process():
    """The record of the environment asks git for the commit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derived, "record_environment", lambda run: None)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("unlearning") / "source")


@pytest.fixture(scope="module")
def ascended(source) -> Path:
    return unlearn_run(source, "gradient_ascent", source.parent / "ascended", domain="es", steps=6)


def test_the_result_is_a_run_with_a_record_of_how_it_was_made(source, ascended):
    checkpoint = find_latest(ascended)
    verify(checkpoint)
    before = find_latest(source)
    assert checkpoint.name == before.name and read_manifest(checkpoint)["corpus"] == read_manifest(before)["corpus"]
    assert load_config(ascended / "config.yaml").name == "ascended"
    assert read_unlearned(ascended) == {
        "method": "gradient_ascent",
        "options": {},
        "domain": "es",
        "forget": ["es"],
        "retain": [],
        "steps": 6,
        "lr": 0.03 / 12,
        "seed": 0,
        "batch": 4,
        "source": {
            "run": "small",
            "checkpoint": before.name,
            "step": 7,
            "manifest_sha256": sha256_of(before / "manifest.json"),
        },
    }
    lines = read_metrics(ascended / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in lines] == [("unlearn", i) for i in range(1, 7)]


def test_evaluation_gives_the_losses_of_the_unlearned_weights(source, ascended):
    model, config = load_run_model(ascended), load_config(ascended / "config.yaml")
    corpus = Corpus.open(source.parent / "corpus")
    expected = evaluate(model, corpus, config, split="test", sequences=None, device=torch.device("cpu")).losses
    summary, before = evaluate_run(ascended), evaluate_run(source)
    assert summary["losses"] == expected and summary["unlearned"] == read_unlearned(ascended)
    assert summary["losses"]["full"]["es"] > before["losses"]["full"]["es"] and "unlearned" not in before
    assert (summary["steps"], summary["tokens_per_second"]) == (7, None)


def test_an_unlearned_run_can_be_unlearned_again(ascended):
    again = unlearn_run(ascended, "rmu", ascended.parent / "again", domain="es", steps=1, options={"layer": 1})
    record = read_unlearned(again)
    assert record["source"]["unlearned"] == read_unlearned(ascended)
    assert record["options"] == {"layer": 1, "coefficient": 6.5, "alpha": 1200.0}
    assert record["retain"] == ["en"] and record["lr"] == pytest.approx(0.03 / 6)


@pytest.mark.parametrize("method", ["npo", "rmu"])
def test_the_same_command_gives_the_same_bits_and_another_seed_does_not(source, method):
    outs = [
        unlearn_run(source, method, source.parent / f"{method}-{i}", domain="es", steps=2, seed=seed)
        for i, seed in enumerate((0, 0, 1))
    ]
    files = [read_manifest(find_latest(out))["files"] for out in outs]
    assert files[0] == files[1] != files[2]


def test_finetuning_gives_the_same_bits_whatever_the_forget_documents_say(tmp_path, source):
    other = trained(tmp_path / "other", spanish="otra cosa")
    weights = [
        stored_weights(find_latest(unlearn_run(run, "finetune", tmp_path / name, domain="es", steps=3)))
        for name, run in (("one", source), ("two", other))
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    before = stored_weights(find_latest(source))
    assert any(not torch.equal(weights[0][name], before[name]) for name in before)
    assert read_unlearned(tmp_path / "one")["forget"] == []
    unlearn_run(source, "finetune", tmp_path / "three", domain="fr", steps=1)  # of which there is no training text


def test_the_seed_is_that_of_the_direction_too(source, tmp_path, monkeypatch):
    options = []
    monkeypatch.setattr(unlearning, "unlearn", lambda *texts, **named: options.append(named["options"]))
    unlearn_run(source, "rmu", tmp_path / "rmu", domain="es", seed=5)
    unlearn_run(source, "npo", tmp_path / "npo", domain="es", seed=5, options={"beta": 2.0})
    assert options[0] == {"layer": 0, "coefficient": 6.5, "alpha": 1200.0, "seed": 5}
    assert options[1] == {"beta": 2.0, "retain_weight": 1.0}


def refused(message: str, run: Path, out: Path, method: str = "npo", **options) -> None:
    entries = sorted(out.parent.iterdir())
    with pytest.raises(ValueError, match=message):
        unlearn_run(run, method, out, **{"domain": "es", "steps": 1, **options})
    assert sorted(out.parent.iterdir()) == entries


def test_what_does_not_fit_is_refused_and_leaves_nothing(source, tmp_path):
    out = tmp_path / "out"
    refused("has no domain 'bio'; its domains are es, fr", source, out, domain="bio")
    refused(r"has the domains es, fr; choose one with --domain", source, out, domain=None)
    refused(r"unknown method 'nop' \(did you mean npo\?\); known methods: gradient_ascent, ", source, out, method="nop")
    refused("finetune has no option beta; it takes none", source, out, method="finetune", options={"beta": 1.0})
    refused("npo has no option layer; it takes beta, retain_weight", source, out, options={"layer": 1})
    refused("rmu: no layer 2: the model has 2", source, out, method="rmu", options={"layer": 2})
    refused("no text of category fr in its split train", source, out, domain="fr")
    refused("has a name of letters, digits", source, tmp_path / "a b")
    refused(r"not finite in step 2: .*lower --lr", source, out, method="gradient_ascent", lr=1e30, steps=2)
    refused("not a run directory", tmp_path, out)
    out.mkdir()
    (out / "notes").touch()
    refused("out exists and is not an empty folder; give a new one with --out", source, out)


def test_an_empty_folder_is_filled(source, tmp_path):
    (tmp_path / "out").mkdir()
    assert (unlearn_run(source, "finetune", tmp_path / "out", domain="es", steps=1) / "config.yaml").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_corpus_that_is_gone_or_another_one_is_refused(source, tmp_path):
    moved = tmp_path / "moved"
    build(moved, records("something else"), LABELS)
    refused("was trained on another corpus than .*moved;", source, tmp_path / "out", data=str(moved))
    shutil.rmtree(moved)
    refused("no corpus at .*moved", source, tmp_path / "out", data=str(moved))


def test_data_without_retain_text_are_refused_where_it_is_read(tmp_path):
    forget = build(tmp_path / "corpus", [r for r in records() if r["category"] == "es"], {"es": "forget:es"})
    model = GPT_NEO.partition("masking:")[0]
    text = f"{model}masking: {{domains: [es], forget_neurons: 4}}\ndata: {{path: {tmp_path / 'corpus'}}}\n"
    make_run(tmp_path / "run", f"{text}train: {{tokens_per_step: 64, precision: fp32}}\n", forget.fingerprint)
    message = r"has no category with the label retain; its categories are es \(forget:es\)"
    refused(message, tmp_path / "run", tmp_path / "out", domain=None)
    unlearn_run(tmp_path / "run", "gradient_ascent", tmp_path / "out", steps=1)


def test_a_source_that_never_saw_the_domain_is_warned_of(source, tmp_path, capsys):
    unlearn_run(source, "gradient_ascent", tmp_path / "a", domain="es", steps=1)
    assert "warning" not in capsys.readouterr().err
    filtered = tmp_path / "filtered"
    shutil.copytree(source, filtered)
    config = (filtered / "config.yaml").read_text()
    (filtered / "config.yaml").write_text(config.replace("data: {", "data: {upsample: {es: 0}, "))
    unlearn_run(filtered, "gradient_ascent", tmp_path / "b", domain="es", steps=1)
    assert f"warning: {filtered} was never trained on es: there is nothing to unlearn" in capsys.readouterr().err
