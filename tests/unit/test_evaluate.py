"""Evaluating a run: other data and a damaged log are refused first, and losses that are not finite have no summary."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import CONFIG, make

from sgtm.run import evaluate as evaluation
from sgtm.run.evaluate import evaluate_run, write_summary


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
