"""Adapters in a checkpoint: the base beside them bit for bit, merged where the full model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_config, tiny_model

from sgtm.model.adapters import Adapter, new_adapters, with_adapters
from sgtm.run.adapters import ADAPTERS, DomainAdapters, adapted_domain, read_adapters, weights_of
from sgtm.run.checkpoint import open_run, read_manifest
from sgtm.run.evaluate import load_bases, load_run_model
from sgtm.run.weights_only import save_weights

CONFIG = tiny_config()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict, DomainAdapters]:
    """The checkpoint of a run, and what was saved."""
    (tmp_path / "config.yaml").write_text(json.dumps(CONFIG.model_dump(mode="json")))
    weights = tiny_model(CONFIG).state_dict()
    by_matrix = {name: Adapter(a, torch.randn_like(b)) for name, (a, b) in new_adapters(weights, 2, 0).items()}
    adapters = DomainAdapters("es", 3.0, by_matrix)
    return save_weights(tmp_path, weights, CONFIG, step=4, corpus="", adapters=adapters), weights, adapters


def same(state: dict, expected: dict) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[name].cpu(), expected[name]) for name in expected)


def test_the_base_is_read_back_bit_for_bit_and_the_full_model_merged(saved):
    checkpoint, weights, adapters = saved
    full = with_adapters(weights, adapters.by_matrix, 1.5)
    assert same(weights_of(checkpoint, adapters=False), weights) and same(weights_of(checkpoint), full)
    run = checkpoint.parents[1]
    assert same(load_run_model(run).state_dict(), full)
    assert same(load_run_model(run, adapters=False).state_dict(), weights)
    ((domain, base),) = load_bases(*open_run(run)).items()
    assert domain == "es" and same(base.state_dict(), weights)


def test_adapters_are_read_as_written(saved):
    checkpoint, _, adapters = saved
    stored = read_adapters(checkpoint)
    assert (adapted_domain(checkpoint), stored.domain, stored.alpha, stored.scale) == ("es", "es", 3.0, 1.5)
    assert same(stored.tensors(), adapters.tensors()) and len(stored.by_matrix) == 8


def test_the_manifest_covers_them(saved):
    checkpoint, *_ = saved
    size = read_manifest(checkpoint)["files"][ADAPTERS]["bytes"]
    (checkpoint / ADAPTERS).write_bytes(b"\0" * size)
    with pytest.raises(ValueError, match=rf"{ADAPTERS} is damaged"):
        open_run(checkpoint.parents[1])


def test_a_file_of_another_kind_is_refused(saved):
    checkpoint, weights, _ = saved
    save_file(dict(weights), checkpoint / ADAPTERS)
    with pytest.raises(ValueError, match=rf"{ADAPTERS} was not written by sgtm adapt: its metadata lack 'adapters'"):
        adapted_domain(checkpoint)


def test_another_checkpoint_has_none(tmp_path):
    checkpoint = save_weights(tmp_path, tiny_model(CONFIG).state_dict(), CONFIG, step=1, corpus="")
    assert adapted_domain(checkpoint) is None and read_adapters(checkpoint) is None
    assert load_bases(CONFIG, checkpoint) == {}
