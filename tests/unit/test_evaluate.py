"""Evaluating a run: other data and a damaged log are refused first, and losses that are not finite have no summary."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import CONFIG, make
from corpora import build, config_for, record
from exports import make_run

from sgtm.config import load_config, save_config
from sgtm.run import evaluate as evaluation
from sgtm.run.evaluate import (
    check_held_out,
    check_sample,
    evaluate_run,
    with_removals,
    write_summary,
)

LABELS = {"en": "retain", "es": "forget:es"}
SPLITS = ("train", "test")


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_an_error_and_no_summary(tmp_path, loss: float):
    """`sgtm eval` then ends with a status other than 0."""
    summary = {"steps": 8, "losses": {"full": {"en": 2.0}, "without es": {"en": loss, "es": 2.0}}}
    (tmp_path / "summary.json").write_text("earlier")
    with pytest.raises(
        ValueError, match=r"not finite after step 8: the loss of en \(without es\); .*lower optimizer.lr"
    ):
        write_summary(tmp_path, summary)
    assert (tmp_path / "summary.json").read_text() == "earlier"
    summary["losses"]["without es"]["en"] = 3.0
    write_summary(tmp_path, summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_a_category_without_text_in_the_split_is_no_sample(tmp_path: Path):
    """There is nothing to measure of it, however many sequences are asked for."""
    corpus = build(tmp_path / "corpus", [record(0, "en", split="test"), record(1, "es")])
    check_sample(corpus, config_for(), "test", ["en", "es"], 2)
    with pytest.raises(ValueError, match="has 2 of en; give at most 2"):
        check_sample(corpus, config_for(), "test", ["en", "es"], 3)
    with pytest.raises(ValueError, match=r"key 3: split test of .* has 2 of en; give at most 2, or all"):
        check_sample(corpus, config_for(), "test", ["en", "es"], 3, "key", "all")


def test_a_training_whose_evaluations_would_lack_losses_is_refused(tmp_path: Path):
    documents = [record(0, "en", split="test"), record(1, "es"), record(2, "en")]
    none = build(tmp_path / "none", documents, LABELS)
    with pytest.raises(ValueError, match=r"split test of .*none has no text of es, whose losses would be missing"):
        check_held_out(none, config_for())
    check_held_out(none, config_for(domains=[]))
    some = build(tmp_path / "some", [*documents, record(3, "es", split="test")], LABELS)
    for sequences in (2, "all", None):
        check_held_out(some, with_sequences(sequences))
    with pytest.raises(ValueError, match=r"train.eval_sequences 3: split test of .* has 2 of en and 2 of es; give at"):
        check_held_out(some, with_sequences(3))


def with_sequences(sequences: int | str | None):
    config = config_for()
    return config.model_copy(update={"train": config.train.model_copy(update={"eval_sequences": sequences})})


def test_a_sample_that_the_split_does_not_have_is_refused(tmp_path: Path):
    corpus = build(tmp_path / "corpus", [record(n, c, 40, s) for n in range(2) for c in LABELS for s in SPLITS], LABELS)
    save_config(config_for(path=str(corpus.path)), tmp_path / "config.yaml")
    make_run(tmp_path / "run", (tmp_path / "config.yaml").read_text(), corpus.fingerprint)
    assert evaluate_run(tmp_path / "run", sequences=6)["sequences"] == 6
    small = f"--sequences 7: split test of {corpus.path} has 6 of en and 6 of es; give at most 6, or leave it out"
    with pytest.raises(ValueError, match=small):
        evaluate_run(tmp_path / "run", sequences=7)


def test_sets_and_strengths_are_checked_before_anything_is_loaded():
    config, run = load_config("debug", ["--masking.domains=[a, b, c]"]), Path("runs/r")
    added = with_removals(config, run, [["b", "a"]], [])
    assert added.removals == [(), ("a",), ("b",), ("c",), ("a", "b"), ("a", "b", "c")]
    own = load_config("debug", ["--masking.domains=[a, b, c]", "--train.eval_removed=[[a, c]]"])
    assert set(with_removals(own, run, [["b", "a"]], []).removals) == {*added.removals, ("a", "c")}
    for remove, strengths, message in (
        ([["a", "d"]], [], "--remove: unknown domain 'd'"),
        ([], [{"d": 0.5}], "--strength: unknown domain 'd'"),
        ([], [{"a": 1.5}], "--strength: strength 1.5 of a: a domain is at a strength from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            with_removals(config, run, remove, strengths)
    unmasked = load_config("debug", ["--masking.strategy=none"])
    assert with_removals(unmasked, run, [], []) == unmasked
    with pytest.raises(ValueError, match="--strength: runs/r was trained without masks, so that no group holds a"):
        with_removals(unmasked, run, [], [{"es": 0.5}])
    with pytest.raises(ValueError, match="--remove: runs/r has es in adapters, so that no group holds a domain"):
        with_removals(config, run, [["a"]], [], "es")


def test_a_run_is_not_evaluated_on_other_data(tmp_path: Path, monkeypatch):
    make(tmp_path, 1)
    (tmp_path / "config.yaml").write_text(json.dumps(CONFIG.model_dump(mode="json")))
    corpus = SimpleNamespace(fingerprint="prepared again", path="data")
    monkeypatch.setattr(evaluation, "open_corpus", lambda config, write: corpus)
    monkeypatch.setattr(evaluation, "check_corpus", lambda corpus, config: None)
    monkeypatch.setattr(evaluation, "load_model", lambda *rest: pytest.fail("evaluated"))
    with pytest.raises(ValueError, match=f"{tmp_path} was trained on another corpus than data; restore that"):
        evaluate_run(tmp_path)


def test_a_damaged_log_is_refused_before_anything_is_computed(tmp_path: Path, monkeypatch):
    make(tmp_path, 1)
    (tmp_path / "config.yaml").write_text(json.dumps(CONFIG.model_dump(mode="json")))
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n{}\n")
    monkeypatch.setattr(
        evaluation, "open_corpus", lambda *rest, **options: SimpleNamespace(fingerprint="of the run", path="data")
    )
    monkeypatch.setattr(evaluation, "check_corpus", lambda corpus, config: None)
    monkeypatch.setattr(evaluation, "load_model", lambda *rest: pytest.fail("evaluated"))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: not UTF-8"):
        evaluate_run(tmp_path)
