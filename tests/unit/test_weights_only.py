"""Checkpoints of weights alone: read as any other, verified, and never resumed from."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from checkpoints import make
from tiny import tiny_config, tiny_model

from sgtm.distributed.storage import WEIGHTS, Stored, stored_weights
from sgtm.run import weights_only
from sgtm.run.checkpoint import TRAINING, WEIGHTS_ONLY, open_run, read_manifest, verify
from sgtm.run.evaluate import load_run_model
from sgtm.run.usable import check_usable
from sgtm.run.weights_only import save_weights

CONFIG = tiny_config()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(json.dumps(CONFIG.model_dump(mode="json")))
    return tmp_path / "run"


def save(run: Path) -> tuple[Path, dict]:
    weights = tiny_model(CONFIG).state_dict()
    return save_weights(run, weights, CONFIG, step=12, corpus="of the run"), weights


def test_weights_are_read_back_bit_for_bit(run):
    saved, weights = save(run)
    assert open_run(run)[1] == saved == run / "checkpoints/step_00000012"
    state = stored_weights(saved)
    assert state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)
    loaded = load_run_model(run).state_dict()
    assert all(torch.equal(loaded[name].cpu(), weights[name]) for name in weights)


def test_the_manifest_states_kind_step_data_and_every_file(run):
    saved, _ = save(run)
    verify(saved)
    manifest = read_manifest(saved)
    assert (manifest["kind"], manifest["step"], manifest["corpus"]) == (WEIGHTS_ONLY, 12, "of the run")
    assert manifest["independent_of"] == [] and set(manifest["files"]) == {WEIGHTS}
    assert stat.S_IMODE((saved / WEIGHTS).stat().st_mode) == stat.S_IMODE((saved / "manifest.json").stat().st_mode)
    (saved / WEIGHTS).write_bytes(b"\0" * manifest["files"][WEIGHTS]["bytes"])
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is damaged"):
        open_run(run)


def test_other_checkpoints_are_those_of_a_training(tmp_path):
    assert read_manifest(*make(tmp_path, 1))["kind"] == TRAINING


def test_half_precision_is_stored_in_fp32(run):
    weights = {name: tensor.bfloat16() for name, tensor in tiny_model(CONFIG).state_dict().items()}
    state = stored_weights(save_weights(run, weights, CONFIG, step=1, corpus=""))
    assert all(state[name].dtype == torch.float32 and torch.equal(state[name], weights[name].float()) for name in state)


def test_a_failed_write_leaves_no_checkpoint(run, monkeypatch):
    def full(weights, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_only, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device: .*model\.safetensors"):
        save(run)
    with pytest.raises(ValueError, match="has no finished checkpoint"):
        open_run(run)


def test_training_does_not_resume_from_weights_alone(run):
    saved, _ = save(run)
    remedy = r"cannot be resumed\. Train a new run from its weights: sgtm export .*run --out FOLDER, and --train"
    with pytest.raises(ValueError, match=rf"{saved} holds weights alone, without the optimizer's state: .* {remedy}"):
        check_usable(run, resume=True, overwrite=False)
    check_usable(run, resume=False, overwrite=True)
    with pytest.raises(ValueError, match=r"holds weights alone \(model\.safetensors\), without the state of an opt"):
        Stored(saved)
    (saved / "manifest.json").write_text("{}")
    check_usable(run, resume=True, overwrite=False)  # a damaged one is state damaged when it is read
