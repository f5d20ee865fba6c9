"""Runs that are opened to be examined or attacked: what is refused, and which are compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import CONFIG, make
from corpora import build, mixed_records
from tampered import tampered

from sgtm.run import evaluate as evaluation
from sgtm.run.opened import check_control, check_same_sequences, knowing_control, open_with_corpus
from sgtm.run.unlearned import write_unlearned


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build(tmp_path_factory.mktemp("data") / "corpus", mixed_records())


@pytest.fixture
def target(corpus, tmp_path, monkeypatch):
    return tampered(monkeypatch, tmp_path / "run", corpus)


def test_of_a_model_without_masks_nothing_is_removed(corpus, tmp_path, monkeypatch):
    assert tampered(monkeypatch, tmp_path / "a", corpus).removed(["es"]) == ("es",)
    assert tampered(monkeypatch, tmp_path / "b", corpus, masking={"strategy": "none"}).removed(["es"]) == ()


def test_runs_on_other_data_or_sequences_are_not_compared(target, corpus, tmp_path, monkeypatch):
    check_same_sequences(target, replace(target, run=Path("other")))
    other = build(tmp_path / "other", mixed_records(50))
    with pytest.raises(ValueError, match="losses are compared on one corpus; leave categories out"):
        check_same_sequences(target, replace(target, run=Path("other"), corpus=other))
    longer = tampered(monkeypatch, tmp_path / "longer", corpus, context=32)
    with pytest.raises(
        ValueError, match=r"longer has model\.context 32, .*run 16: their losses are of other sequences"
    ):
        check_same_sequences(target, longer)
    alone = tampered(monkeypatch, tmp_path / "alone", corpus, isolate_documents=True)
    with pytest.raises(ValueError, match=r"alone has model\.context 16 and isolated documents"):
        check_same_sequences(target, alone)


def test_a_control_is_another_run_of_the_same_sequences(target, corpus, tmp_path, monkeypatch):
    check_control(target, replace(target, run=Path("other")))
    with pytest.raises(ValueError, match="run is the run itself; a control is another run, trained without the domain"):
        check_control(target, replace(target, run=target.run / ".." / target.run.name))
    with pytest.raises(ValueError, match=r"their losses are of other sequences"):
        check_control(target, tampered(monkeypatch, tmp_path / "longer", corpus, context=32))


def as_run(folder: Path, *steps: int) -> Path:
    make(folder, *steps)
    (folder / "config.yaml").write_text(json.dumps(CONFIG.model_dump(mode="json")))
    return folder


def test_a_run_without_checkpoint_or_corpus_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has no checkpoint yet; train first"):
        open_with_corpus(as_run(tmp_path))
    with pytest.raises(ValueError, match=r"no corpus at .*gone: .* with --data\.path DIR"):
        open_with_corpus(as_run(tmp_path, 1), str(tmp_path / "gone"))
    opened = SimpleNamespace(fingerprint="prepared again", path="data")
    monkeypatch.setattr(evaluation, "open_corpus", lambda config, write: opened)
    monkeypatch.setattr(evaluation, "check_corpus", lambda corpus, config: None)
    with pytest.raises(ValueError, match="was trained on another corpus than data;"):
        open_with_corpus(tmp_path)


def test_other_weights_have_another_digest(tmp_path, monkeypatch):
    monkeypatch.setattr(
        evaluation, "open_corpus", lambda config, write: SimpleNamespace(path="data", fingerprint="of the run")
    )
    monkeypatch.setattr(evaluation, "check_corpus", lambda corpus, config: None)
    steps = {"a": 1, "b": 1, "c": 2}
    one, same, other = (open_with_corpus(as_run(tmp_path / name, step)) for name, step in steps.items())
    assert one.weights == same.weights != other.weights and one.checkpoint.name == "step_00000001"


def test_controls_that_may_have_seen_the_domain_are_warned_of(corpus, tmp_path, monkeypatch):
    filtered = {"masking": {"strategy": "none"}, "upsample": {"es": 0}}
    unseen = tampered(monkeypatch, tmp_path / "unseen", corpus, **filtered)
    assert knowing_control(unseen, ["es"]) == ""
    seen = tampered(monkeypatch, tmp_path / "seen", corpus, masking={"strategy": "none"})
    assert "was trained on" in knowing_control(seen, ["es"]) and knowing_control(seen, ["bio"]) == ""
    train = unseen.config.train.model_copy(update={"init_from": "export/of-another"})
    begun = replace(unseen, config=unseen.config.model_copy(update={"train": train}))
    message = "began with the weights of export/of-another, which may have seen es"
    assert message in knowing_control(begun, ["es"])
    source = {"run": "adapted", "step": 9, "adapted": {"domain": "es"}}
    record = {"options": {}, "domain": "es", "method": "npo", "steps": 1, "lr": 1.0, "seed": 0, "source": source}
    write_unlearned(unseen.run, record)
    assert knowing_control(unseen, ["es"]).endswith("was unlearned from a run with adapters of es")
    assert knowing_control(unseen, ["bio"]) == ""
