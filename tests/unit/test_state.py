"""What a sweep finds in the directory of a run; tests/processes/test_sweep_run.py has what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from sweeps import evaluation, step, sweep_of, write_run

from sgtm.config import load_config
from sgtm.sweep.state import BEGUN, FINISHED, NEW, TAIL, differences, final_losses, state_of, steps_done

LOSSES = {"full": {"en": 1.0}, "without es": {"en": 2.0}}


@pytest.fixture
def run(tmp_path: Path):
    (run,) = sweep_of(tmp_path, "variants: {a: }").runs
    return run


def test_a_run_is_finished_when_its_last_step_is_evaluated(run):
    assert state_of(run, None) == NEW
    run.directory.mkdir(parents=True)
    assert state_of(run, None) == NEW, "a folder without a config"
    for lines, expected in (
        ([], BEGUN),
        ([step(4)], BEGUN),
        ([evaluation(3, LOSSES)], BEGUN),
        ([evaluation(4, LOSSES)], FINISHED),
    ):
        write_run(run, *lines)
        assert state_of(run, None) == expected


def test_of_several_evaluations_of_the_last_step_the_last_counts(run):
    again = {"full": {"en": 9.0}}
    write_run(run, evaluation(4, LOSSES), evaluation(4, again), evaluation(3, LOSSES))
    assert final_losses(run.directory, run.config) == again


def test_keys_that_change_nothing_in_the_results_may_differ(run):
    write_run(run)
    file = str(run.directory / "config.yaml")
    free = load_config(file, ["--runs=elsewhere", "--wandb.project=other", "--wandb.mode=offline"])
    assert free.runs != run.config.runs and differences(run.config, free) == []
    other = load_config(file, ["--wandb.project=other", "--optimizer.lr=0.5", "--data.upsample={en: 2}"])
    assert sorted(differences(run.config, other)) == [
        "data.upsample.en: None in the directory, 2.0 in the sweep",
        "optimizer.lr: 0.001 in the directory, 0.5 in the sweep",
    ]


def test_a_damaged_manifest_is_left_to_the_resume(run):
    write_run(run, step(2))
    (run.directory / "checkpoints" / "step_00000002").mkdir(parents=True)
    (run.directory / "checkpoints" / "step_00000002" / "manifest.json").write_text("{")
    assert state_of(run, SimpleNamespace(fingerprint="of the data", path="data")) == BEGUN


def test_steps_are_read_from_the_end_of_a_long_log(tmp_path: Path):
    log = tmp_path / "metrics.jsonl"
    lines = [json.dumps(step(number) | {"text": "x" * 100}) for number in range(2000)]
    log.write_text("\n".join([*lines, '{"kind": "note"}', "[]", ""]))
    assert log.stat().st_size > 2 * TAIL and steps_done(tmp_path) == 1999
    assert steps_done(log) == 0, "a file in the place of the directory"
