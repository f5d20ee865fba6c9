"""Which settings differ between a checkpoint and the config that resumes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import CONFIG, make

from sgtm.config import load_config
from sgtm.config.sections import SteeringConfig
from sgtm.run.checkpoint import read_manifest, resolved, write_manifest
from sgtm.run.resume import _manifest_of_this_run, differences

MAPPINGS = [
    "--masking.forget_heads={es: []}",
    "--masking.forget_heads={es: [1]}",
    "--masking.forget_neurons={es: 3}",
    "--masking.percent={es: 25}",
    "--masking.overrides={active.unlabeled.es: 0.5}",
    "--data.upsample={en: 2}",
    "--data.channel={}",
    "--data.channel={retain: {retain: 1}}",
    "--data.schedule={0.5: {retain: {unlabeled: 1}}}",
]


def saved(*overrides: str) -> dict:
    """The settings as a checkpoint's manifest has them."""
    return json.loads(json.dumps(resolved(load_config("debug", list(overrides)))))


@pytest.mark.parametrize("override", MAPPINGS)
def test_a_key_with_a_mapping(override):
    config, plain = load_config("debug", [override]), load_config("debug")
    assert differences(saved(override), config) == []
    assert differences(saved(), config) and differences(saved(override), plain)


def test_a_warm_up_in_steps_resumes_as_its_share():
    config = load_config("debug", ["--optimizer.warmup_steps=0.25"])
    assert differences(saved("--optimizer.warmup_steps=2"), config) == []
    (changed,) = differences(saved("--optimizer.warmup_steps=3"), config)
    assert changed == "optimizer.warmup_steps: 3 in the checkpoint, 2 now"
    longer = load_config("debug", ["--optimizer.warmup_steps=0.25", "--train.steps=16"])
    changed, steps = differences(saved("--optimizer.warmup_steps=2"), longer)
    assert changed == "optimizer.warmup_steps: 2 in the checkpoint, 4 now, as 0.25 of train.steps"
    assert steps.startswith("train.steps: ")


def test_a_key_that_is_younger_than_the_checkpoint_had_its_default():
    older = saved()
    del older["masking"]["domain_embedding"], older["data"]["schedule"]
    assert differences(older, load_config("debug")) == []
    now = load_config("debug", ["--masking.domain_embedding=4"])
    assert differences(older, now) == ["masking.domain_embedding: none in the checkpoint, 4 now"]


def test_a_token_filter_is_neither_added_nor_taken_off():
    unmasked = ("--masking.strategy=none", "--masking.span_policy=position", "--data.mixing=token")
    older, filtered = saved(*unmasked), load_config("debug", [*unmasked, "--data.token_filter=loss"])
    del older["data"]["token_filter"]
    assert differences(older, load_config("debug", list(unmasked))) == []
    assert differences(older, filtered) == ["data.token_filter: off in the checkpoint, loss now"]
    hidden = saved(*unmasked, "--data.token_filter=hide")
    assert differences(hidden, filtered) == ["data.token_filter: hide in the checkpoint, loss now"]


def test_experts_are_balanced_as_before():
    mixtral = (
        "--model.family=mixtral", "--model.window=null", "--model.experts=6", "--model.experts_per_token=2",
        "--masking.forget_neurons=0",
    )  # fmt: skip
    older, balanced = saved(*mixtral), load_config("debug", [*mixtral, "--train.expert_balance=0.01"])
    del older["train"]["expert_balance"]
    assert differences(older, load_config("debug", list(mixtral))) == []
    assert differences(older, balanced) == ["train.expert_balance: 0.0 in the checkpoint, 0.01 now"]


def test_a_run_is_not_resumed_on_other_data(tmp_path: Path):
    """Wherever the same data are."""
    (saved,) = make(tmp_path, 1)
    _manifest_of_this_run(saved, CONFIG, "of the run")
    elsewhere = CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"path": "elsewhere"})})
    _manifest_of_this_run(saved, elsewhere, "of the run")
    with pytest.raises(
        ValueError, match=rf"other settings:\n  data\.path: {tmp_path} was trained on another corpus than data; restore"
    ) as caught:
        _manifest_of_this_run(saved, CONFIG, "prepared again")
    assert "--resume takes those of the run" not in str(caught.value)


STEERED = ["--steering.direction=es.safetensors", "--steering.layer=1"]


def test_steering_is_the_same_and_its_direction_may_be_elsewhere():
    older = saved()
    del older["steering"]
    assert differences(older, load_config("debug")) == []
    moved = load_config("debug", ["--steering.direction=/elsewhere", "--steering.layer=1"])
    assert differences(saved(*STEERED), moved) == []
    stronger = load_config("debug", [*STEERED, "--steering.strength=2"])
    assert differences(saved(*STEERED), stronger) == ["steering.strength: 1.0 in the checkpoint, 2.0 now"]


@pytest.mark.parametrize(
    ("before", "now", "problem"),
    [
        ("abc", "abc", None),
        ("abc", "def", r"a file with SHA-256 abc in the checkpoint, es.safetensors with SHA-256 def now; restore"),
        ("abc", None, r"a file with SHA-256 abc in the checkpoint, none now"),
        (None, "abc", r"none in the checkpoint, es.safetensors with SHA-256 abc now"),
    ],
)
def test_a_run_is_not_resumed_with_another_direction(tmp_path: Path, before, now, problem):
    (checkpoint,) = make(tmp_path, 1)
    write_manifest(checkpoint, read_manifest(checkpoint) | {"direction": before})
    config = CONFIG.model_copy(update={"steering": SteeringConfig(direction=now and "es.safetensors")})
    if problem is None:
        assert _manifest_of_this_run(checkpoint, config, "of the run", now)["direction"] == before
        return
    with pytest.raises(ValueError, match=rf"other settings:\n  steering\.direction: {problem}"):
        _manifest_of_this_run(checkpoint, config, "of the run", now)
