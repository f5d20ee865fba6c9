"""Which checkpoint counts, and when: the pointer, the order of writing, what is advised when one is damaged.

`tests/dist/test_checkpoint.py` saves and loads real ones.

Faults tried, each seen to fail: the pointer ignored; an empty one taken for the folder of all checkpoints; `latest`
written before the rename; a damaged older checkpoint advised; another corpus accepted on resuming and on evaluating.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_config

from sgtm.evaluate import run as evaluation
from sgtm.evaluate.run import evaluate_run
from sgtm.train import checkpoint
from sgtm.train.checkpoint import _advice, _publish, _refuse_other_run, find_latest, open_run, verify

CONFIG = tiny_config()


def manifest_of(folder: Path, corpus: str = "of the run") -> dict:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
    }
    return {"step": 1, "ranks": 1, "corpus": corpus, "config": checkpoint._resolved(CONFIG), "files": files}


def make(run: Path, *steps: int) -> list[Path]:
    """Whole checkpoints of these steps, published in this order."""
    for step in steps:
        temporary = run / "checkpoints" / f".tmp-{step}"
        temporary.mkdir(parents=True)
        (temporary / "weights").write_text(f"of step {step}")
        _publish(temporary, run / f"checkpoints/step_{step:08d}", manifest_of(temporary), keep_last=9)
    return [run / f"checkpoints/step_{step:08d}" for step in steps]


def test_the_pointer_is_followed(tmp_path: Path):
    newer, older = make(tmp_path, 2, 1)
    assert find_latest(tmp_path) == older
    (tmp_path / "checkpoints/latest").write_text(f"{newer.name}\n")
    assert find_latest(tmp_path) == newer


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe\x00", b"step_00000007", b".", b"step_\0", b"notes"])
def test_a_pointer_that_names_no_checkpoint_gives_way_to_the_newest_whole_one(tmp_path: Path, content: bytes):
    _, newest = make(tmp_path, 1, 2)
    (tmp_path / "checkpoints/step_00000009").mkdir()  # without a manifest: not whole
    (tmp_path / "checkpoints/notes").mkdir()
    (tmp_path / "checkpoints/latest").write_bytes(content)
    assert find_latest(tmp_path) == newest


def test_the_pointer_moves_after_the_checkpoint_is_in_place(tmp_path: Path, monkeypatch):
    (older,) = make(tmp_path, 1)
    rename = os.replace

    def killed(source, target) -> None:
        if Path(target).name.startswith("step_"):
            raise OSError("killed here")
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", killed)
    with pytest.raises(OSError, match="killed here"):
        make(tmp_path, 2)
    assert (tmp_path / "checkpoints/latest").read_text() == f"{older.name}\n" and find_latest(tmp_path) == older


def test_what_is_advised_is_whole(tmp_path: Path):
    oldest, older, newest = make(tmp_path, 1, 2, 3)
    (tmp_path / "config.yaml").write_text(json.dumps(CONFIG.model_dump(mode="json")))
    (newest / "weights").write_text("no")
    advice = "The newest whole checkpoint before it is {}: remove {} to resume from there"
    assert _advice(newest) == advice.format(older, newest)
    (older / "weights").write_text("of step X")
    assert _advice(newest) == advice.format(oldest, newest)
    with pytest.raises(ValueError, match=f"weights has 2 bytes, written were 9.*before it is {oldest}"):
        open_run(tmp_path)
    (oldest / "weights").unlink()
    assert _advice(newest) == "There is no whole checkpoint before it"


@pytest.mark.parametrize(
    "damage", [{"files": []}, {"files": {}}, {"files": {"weights": {}}}, {"files": {"weights": {"bytes": 9}}}], ids=str
)
def test_a_damaged_manifest_is_named(tmp_path: Path, damage: dict):
    (saved,) = make(tmp_path, 1)
    file = saved / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(ValueError, match=r"step_00000001/manifest\.json is damaged: "):
        verify(saved)


def test_a_run_is_not_resumed_on_other_data(tmp_path: Path):
    (saved,) = make(tmp_path, 1)
    _refuse_other_run(saved, CONFIG, "of the run", 1)
    with pytest.raises(ValueError, match=r"other settings:\n  data\.path: data has been prepared anew since") as caught:
        _refuse_other_run(saved, CONFIG, "prepared anew", 1)
    assert "--resume takes those of the run" not in str(caught.value)


def test_a_run_is_not_evaluated_on_other_data(tmp_path: Path, monkeypatch):
    make(tmp_path, 1)
    (tmp_path / "config.yaml").write_text(json.dumps(CONFIG.model_dump(mode="json")))
    corpus = SimpleNamespace(fingerprint="prepared anew", path="data")
    monkeypatch.setattr(evaluation, "open_corpus", lambda config, write: corpus)
    monkeypatch.setattr(evaluation, "check_corpus", lambda corpus, config: None)
    monkeypatch.setattr(evaluation, "load_model", lambda *rest: pytest.fail("evaluated"))
    with pytest.raises(ValueError, match=f"{tmp_path} was trained on other data than data holds now"):
        evaluate_run(tmp_path)
