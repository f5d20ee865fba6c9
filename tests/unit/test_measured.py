"""sgtm/run/measured.py: the losses of a run at a step, from an evaluation or from training."""

import json

import pytest

from sgtm.run.measured import measured_at, read_summary

LOSSES = {"full": {"en": 1.5, "es": 2.0}, "without es": {"en": 1.6, "es": 8.0}}
LINE = {"kind": "eval", "losses": LOSSES, "errors": {"full": {"en": 0.1}}, "true_labels": {"en": "retain"}}
FIELDS = {"losses": LOSSES, "errors": {"full": {"en": 0.1}}, "measured": {}, "true_labels": {"en": "retain"}}


def write(run, summary=None, lines=()):
    if summary is not None:
        (run / "summary.json").write_text(json.dumps(summary))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_an_evaluation_of_the_step_comes_before_one_in_training(tmp_path):
    write(tmp_path, {**LINE, "steps": 9, "split": "train"}, [{**LINE, "step": 9}])
    assert measured_at(tmp_path, 9, 64) == {**FIELDS, "split": "train", "sequences": None, "by": "sgtm eval"}


def test_else_the_last_one_in_training_at_that_step(tmp_path):
    other = {**LINE, "losses": {"full": {"en": 3.0}}}
    write(tmp_path, {**LINE, "steps": 9}, [{**other, "step": 7}, {**LINE, "step": 7}, {**other, "step": 8}])
    assert measured_at(tmp_path, 7, 64) == {**FIELDS, "split": "test", "sequences": 64, "by": "sgtm train"}


def test_nothing_of_another_step_is_taken(tmp_path):
    write(tmp_path, {**LINE, "steps": 9}, [{**LINE, "step": 7}, {"kind": "step", "step": 8}])
    assert measured_at(tmp_path, 8, 64) is None


def test_a_damaged_summary_is_named(tmp_path):
    assert read_summary(tmp_path) == {}
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json is not valid JSON .*; run `sgtm eval` again"):
        read_summary(tmp_path)
