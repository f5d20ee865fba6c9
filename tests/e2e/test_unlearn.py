"""`sgtm unlearn` on a trained run: evaluation, export and report take the result, training refuses to resume it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sgtm.run.checkpoint import find_latest
from sgtm.run.evaluate import load_run_model
from sgtm.unlearning.text import Text
from sgtm_kernels.plan import MaskPlan


def sgtm(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "sgtm", *map(str, arguments)], capture_output=True, text=True)


def succeeded(*arguments: object) -> str:
    done = sgtm(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """`full`, trained, and `unlearned`, by gradient ascent from it."""
    runs = tmp_path_factory.mktemp("runs")
    succeeded("train", "debug", f"--runs={runs}", "--name=full")
    command = ("unlearn", runs / "full", "--method", "gradient_ascent", "--steps", 12, "--lr", 3e-3)
    assert "next: sgtm eval" in succeeded(*command, "--out", runs / "unlearned")
    return runs


def evaluated(run: Path) -> dict:
    succeeded("eval", run, "--sequences=4")
    return json.loads((run / "summary.json").read_text())


def test_evaluation_measures_the_unlearned_weights(runs: Path):
    before, after = evaluated(runs / "full"), evaluated(runs / "unlearned")
    assert after["losses"]["full"]["es"] > before["losses"]["full"]["es"] + 0.1
    assert set(after["losses"]) == {"full", "without es"} and after["unlearned"]["source"]["run"] == "full"
    succeeded("report", runs / "unlearned")
    assert "by <code>gradient_ascent</code>" in (runs / "unlearned/report/index.html").read_text()


def test_the_export_computes_what_the_unlearned_model_does(runs: Path):
    succeeded("export", runs / "unlearned", "--out", runs / "export")
    model, theirs = load_run_model(runs / "unlearned"), AutoModelForCausalLM.from_pretrained(runs / "export")
    from sgtm.config.load import load_run_config
    from sgtm.masking.strategy import removal_tables

    tables = removal_tables(load_run_config(runs / "unlearned").space, ())
    ids = torch.arange(64)[None]
    text = Text(ids, ids, MaskPlan.uniform(tables, 0, 1, 64))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model.logits(text.input_ids, text.plan), rtol=1e-4, atol=1e-4)
    record = json.loads((runs / "export/sgtm_export.json").read_text())
    assert record["unlearned"]["method"] == "gradient_ascent"


def test_it_is_not_resumed(runs: Path):
    weights = load_file(find_latest(runs / "unlearned") / "model.safetensors")
    done = sgtm("train", runs / "unlearned", "--resume")
    assert done.returncode == 2 and "holds weights alone, without the optimizer's state" in done.stderr
    again = load_file(find_latest(runs / "unlearned") / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
