"""A run that is made of another one: its folder, complete or absent, its config, and what it records of its source."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from corpora import build, config_for, record
from exports import GPT_NEO, make_run

from sgtm.config import load_config
from sgtm.files import sha256_of
from sgtm.run.adapted import write_adapted
from sgtm.run.checkpoint import find_latest
from sgtm.run.metrics import read_metrics
from sgtm.unlearning import derived
from sgtm.unlearning.derived import check_out, new_run, own_config, read_text, source_record
from sgtm.unlearning.text import Sequences


@pytest.fixture(autouse=True)
def no_process(monkeypatch):
    """The record of the environment asks git for the commit."""
    monkeypatch.setattr(derived, "record_environment", lambda run: None)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_run_appears_when_it_is_complete(tmp_path, capsys):
    out, config = tmp_path / "out", load_config("debug", ["--name=out"])
    with new_run(out, config, 25) as (_folder, log):
        for step in range(1, 26):
            log({"kind": "adapt", "step": step, "loss": 1.0, "lr": 0.1})
        assert not out.exists()
    assert names(tmp_path) == ["out"] and names(out) == ["config.yaml", "metrics.jsonl", "trained_in"]
    assert load_config(out / "config.yaml").name == "out" and len(read_metrics(out / "metrics.jsonl")) == 25
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed] == [f"{step}/25" for step in (*range(2, 26, 2), 25)]
    assert printed[-1] == "step 25/25  loss 1"


def test_one_that_fails_is_absent(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_run(tmp_path / "out", load_config("debug"), 1) as (folder, _):
        (folder / "weights").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_folder_with_content_and_a_name_that_no_run_has_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty")
    check_out(tmp_path / "new")
    with pytest.raises(ValueError, match=r"exists and is not an empty folder; give a new one with --out"):
        check_out(tmp_path)
    with pytest.raises(ValueError, match="a run directory has a name of letters, digits"):
        check_out(tmp_path / "a b")


def test_synthetic_data_are_found_from_another_folder(tmp_path):
    config, corpus = load_config("debug"), SimpleNamespace(path=tmp_path / "runs/synthetic-512")
    beside, elsewhere = (own_config(config, corpus, out) for out in (tmp_path / "runs/x", tmp_path / "other/x"))
    assert (beside.data.path, beside.runs, beside.name) == ("synthetic", str(tmp_path / "runs"), "x")
    assert (elsewhere.data.path, elsewhere.runs) == (str(corpus.path), str(tmp_path / "other"))


def test_the_source_is_recorded_with_how_it_was_made(tmp_path):
    run, config = tmp_path / "run", load_config("debug", ["--name=mine"])
    make_run(run, GPT_NEO)
    checkpoint = find_latest(run)
    expected = {"run": "mine", "checkpoint": "step_00000007", "step": 7}
    expected["manifest_sha256"] = sha256_of(checkpoint / "manifest.json")
    assert source_record(run, config, checkpoint) == expected
    options = {"rank": 2, "alpha": 4.0}
    earlier = {"domain": "es", "options": options, "steps": 1, "lr": 1.0, "seed": 0, "seen": False, "source": expected}
    write_adapted(run, earlier)
    assert source_record(run, config, checkpoint) == expected | {"adapted": earlier}


def test_text_is_that_of_a_true_label(tmp_path):
    records = [record(n, name, 30) for n in range(4) for name in ("en", "es")]
    corpus, config = build(tmp_path / "corpus", records), config_for()
    categories, sequences = read_text(corpus, config, "forget:es", 3)
    assert categories == ["es"] and sequences.label == 2
    alike, other = (Sequences(corpus, config, ["es"], seed) for seed in (3, 4))
    assert torch.equal(sequences.batch(0).input_ids, alike.batch(0).input_ids)
    assert not torch.equal(sequences.batch(0).input_ids, other.batch(0).input_ids)
    assert read_text(corpus, config, "forget:es", 3, read=False) == ([], None)
    with pytest.raises(ValueError, match=r"has no category with the label forget:fr; its categories are en \(retain\)"):
        read_text(corpus, config, "forget:fr", 0)
