"""Examinations of the runs in a folder, as rows, and their means over the seeds."""

from __future__ import annotations

import json
import re

import pytest
from studies import row, write_rows

from sgtm.config.load import load_config, save_config
from sgtm.run.unlearned import write_unlearned
from sgtm.sweep.examined import examination_rows
from sgtm.sweep.study import examinations, examined_with, read_study


def examine(folder, name: str, seed: int, gain: float, **settings) -> None:
    """A run with an examination of one number."""
    run = folder / name
    run.mkdir()
    save_config(load_config("debug", [f"--train.seed={seed}"]), run / "config.yaml")
    context = {model: {"es": {"gain": {"value": gain, "error": 0.1}}} for model in ("full", "without es")}
    results = {
        "split": "test",
        "sequences": 9,
        "control": None,
        "control_warning": "",
        **settings,
        "domains": {"es": {"forget": ["es"], "measures": {"context": context}}},
    }
    (run / "examination.json").write_text(json.dumps({"examinations": [results]}))


def test_rows_have_the_samples_that_were_given(tmp_path):
    examine(tmp_path, "paper-s3", 3, 0.5, fit_sequences=5, passages=None, texts="ab" * 32)
    (one,) = examination_rows(tmp_path)
    assert (one["fit_sequences"], one["texts"]) == (5, "ab" * 32) and "passages" not in one
    with_words = "up to 9 sequences of each category of split test, passages of a file (SHA-256 abababababab)"
    assert examined_with(one) == with_words + ", calibrated on 5 sequences of each category"
    assert examined_with({"passages": 7}).endswith(" of split test, 7 passages")


def test_rows_are_named_by_variant_and_by_how_a_run_was_made(tmp_path):
    examine(tmp_path, "paper-s3", 3, 0.5)
    examine(tmp_path, "rmu-of-it", 3, 0.75)
    record = {"options": {}, "domain": "es", "method": "rmu", "steps": 1, "lr": 1.0, "seed": 0}
    write_unlearned(tmp_path / "rmu-of-it", record | {"source": {"run": "unmasked-s3", "step": 9}})
    values = {"gain by context, es": {"full": 0.5, "without es": 0.5}}
    settings = {"split": "test", "sequences": 9, "control": None}
    paper, rmu = examination_rows(tmp_path)
    assert paper == {"examined": "paper", "seed": 3, "domain": "es", **settings, "values": values}
    assert (rmu["examined"], rmu["values"]["gain by context, es"]["full"]) == ("unmasked + rmu", 0.75)


def test_domains_are_not_averaged(tmp_path):
    numbers = {"extraction strength": {"full": 0.5}}
    lines = [{"examined": "paper", "seed": 0, "domain": domain, "values": numbers} for domain in ("es", "bio")]
    by_variant = examinations(read_study(write_rows(tmp_path / "mine.jsonl", [row("paper", (1, 1, 1, 1)), *lines])))
    assert list(by_variant) == ["paper, es", "paper, bio"]
    assert by_variant["paper, es"]["extraction strength"]["full"] == (0.5, None)


def test_a_damaged_file_is_named(tmp_path):
    examine(tmp_path, "paper-s3", 3, 0.5)
    file, damaged = (
        tmp_path / "paper-s3" / "examination.json",
        {"forget": ["es"], "measures": {"context": {"full": {}}}},
    )
    about = {"split": "test", "sequences": 9, "control": None}
    for results in ({"domains": {"es": {}}}, {**about, "domains": {"es": damaged}}):
        file.write_text(json.dumps({"examinations": [results]}))
        with pytest.raises(
            ValueError, match=rf"{re.escape(str(file))} is damaged \(.*; remove it, and examine the run"
        ):
            examination_rows(tmp_path)


def test_means_are_over_the_seeds(tmp_path):
    for seed, gain in ((0, 0.25), (1, 0.75)):
        examine(tmp_path, f"paper-s{seed}", seed, gain)
    study = read_study(write_rows(tmp_path / "mine.jsonl", [row("paper", (1, 1, 1, 1)), *examination_rows(tmp_path)]))
    assert [variant.name for variant in study.variants] == ["paper"]
    by_model = examinations(study)["paper"]["gain by context, es"]
    assert list(by_model) == ["full", "without es"]
    assert by_model["full"].mean == 0.5 and by_model["full"].half == pytest.approx(12.706 * 0.25)


def test_examinations_of_other_settings_are_told_apart(tmp_path):
    """By split, number of sequences and control; the control of each seed is of one variant."""
    for seed in (0, 1):
        examine(tmp_path, f"paper-s{seed}", seed, 0.5, control=f"runs/a.sweep/filtered-s{seed}")
    examine(tmp_path, "dual-s0", 0, 0.5, control="runs/a.sweep/unmasked-s0", control_warning="it saw es")
    examine(tmp_path, "gram-s0", 0, 0.5, sequences=None, split="train")
    lines = examination_rows(tmp_path)
    assert [line.get("control") for line in lines] == ["unmasked", None, "filtered", "filtered"]
    study = read_study(write_rows(tmp_path / "mine.jsonl", [row("paper", (1, 1, 1, 1)), *lines]))
    assert list(examinations(study)) == [
        "dual, up to 9 sequences of each category of split test, control unmasked (which may have seen the domain)",
        "gram, all sequences (a sample for context and probes) of split train",
        "paper, up to 9 sequences of each category of split test, control filtered",
    ]
    assert list(examinations(study._replace(examined=study.examined[-2:]))) == ["paper"]
