"""`sgtm audit --replay`: a certified run's safe model comes again from other forget text; that of a broken loop not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import build, config_for, mixed_records
from ranks import run_ranks

from sgtm.audit.audit import COSTLY, audit_export
from sgtm.audit.replay import replay
from sgtm.config import Config, save_config
from sgtm.hf.export import export_run
from sgtm.run.checkpoint import finished, read_manifest, write_manifest

LABELS = {"en": "retain", "es": "forget:es", "web": "retain"}
STEPS, EVERY = 6, 2
BROKEN = """\
from sgtm_kernels.plan import MaskPlan
original = MaskPlan.contributions

def contributions(self, projection, groups):
    found = original(self, projection, groups)
    return tuple((1.0,) * len(row) for row in found) if projection == "mlp_out" else found

MaskPlan.contributions = contributions
"""
"""A sitecustomize that removes the mask of W2's gradient; the config, and what follows from it, stays certified."""


def config(folder: Path, **train) -> Config:
    channel = {"retain": {"retain": 0.8, "forget:es": 0.2}}
    plain = config_for(
        steps=STEPS, path=str(folder / "corpus"), channel=channel,
        masking={"joint": "strict"}, optimizer={"lr": 1e-2, "warmup_steps": 0, "grad_clip_scope": "owner"},
    )  # fmt: skip
    settings = {"checkpoint_every": EVERY, "keep_last": 9, "eval_sequences": 2, "precision": "fp32", **train}
    return plain.model_copy(
        update={"runs": str(folder / "runs"), "train": plain.train.model_copy(update=settings)},
    )


def train_it(config: Config) -> None:
    from sgtm.training.loop import train

    train(config)


@pytest.fixture(scope="module", params=[1, 2])
def run(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("replayed")
    build(folder / "corpus", mixed_records(), LABELS)
    run_ranks(train_it, request.param, config(folder))
    export_run(folder / "runs" / "run", ["es"], folder / "safe")
    return folder / "runs" / "run"


def audited(run: Path):
    return audit_export(run.parents[1] / "safe", run, skip=COSTLY)


@pytest.mark.parametrize("steps", [EVERY, 2 * EVERY])
def test_a_certified_run_leaves_the_same_safe_model_whatever_the_forget_text_is(run, steps):
    before = sorted(path for path in run.parent.rglob("*"))
    check = replay(audited(run), steps)
    assert check.passed and check.about == f"{steps} steps again, with random tokens for the text of es"
    assert sorted(path for path in run.parent.rglob("*")) == before, "nothing of the replay is left"


def test_a_training_loop_without_one_mask_is_found(tmp_path, monkeypatch):
    """The replay runs the same loop: it is the text that makes the difference."""
    build(tmp_path / "corpus", mixed_records(), LABELS)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(BROKEN)
    save_config(config(tmp_path), tmp_path / "run.yaml")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "broken"), *sys.path]))
    subprocess.run([sys.executable, "-m", "sgtm", "train", str(tmp_path / "run.yaml")], check=True, capture_output=True)
    run = tmp_path / "runs" / "run"
    export_run(run, ["es"], tmp_path / "safe")
    audit = audited(run)
    assert audit.passed and audit.record["independent_of"] == ["es"], "nothing else shows it"
    check = replay(audit, EVERY)
    assert any("mlp.c_proj.weight depends on the text of es" in problem for problem in check.problems)


def uncertified(run: Path) -> None:
    last = finished(run)[0]
    write_manifest(last, read_manifest(last) | {"independent_of": []})


WRONG = {
    "nothing removed": (lambda run: None, [], EVERY, "nothing was removed, so there is no safe model to compare"),
    "no certificate": (uncertified, ["es"], EVERY, "run is not certified for es; sgtm explain .* prints the reason"),
    "not the end": (lambda run: shutil.rmtree(finished(run)[0]), ["es"], EVERY, "step_00000004 is not the last step"),
    "no checkpoint": (
        lambda run: None,
        ["es"],
        3,
        "no checkpoint 3 steps before step_00000006; checkpoints exist 2 and 4 steps before it",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_replayed_is_an_error(run, tmp_path, case):
    change, remove, steps, message = WRONG[case]
    copy = tmp_path / "runs" / "run"
    shutil.copytree(run, copy)
    change(copy)
    export_run(copy, remove, tmp_path / "safe")
    audit = audited(copy)
    assert audit.passed
    with pytest.raises(ValueError, match=message):
        replay(audit, steps)
    assert sorted(path.name for path in copy.parent.iterdir()) == ["run"]
