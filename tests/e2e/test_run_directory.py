"""Run directories: a refused run leaves none and harms none, a finished one says so, an unevaluated one is reported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sgtm.data.store import Corpus

STEPS = 3


def sgtm(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sgtm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def train(runs: Path, *arguments: str) -> subprocess.CompletedProcess:
    return sgtm("train", "debug", f"--runs={runs}", f"--train.steps={STEPS}", *arguments)


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    done = train(runs, "--name=whole")
    assert done.returncode == 0, done.stderr
    return runs / "whole"


@pytest.mark.parametrize(
    "mistake",
    ["--masking.domains=[bio]", "--data.path=nowhere", "--train.micro_batch=3", "--train.eval_sequences=100000"],
)
def test_a_refused_run_leaves_no_directory_and_the_old_one_as_it_was(finished: Path, mistake: str):
    runs, before = finished.parent, contents(finished)
    refused = train(runs, "--name=refused", mistake)
    assert refused.returncode == 2 and "error: " in refused.stderr
    assert sorted(path.name for path in runs.iterdir()) == ["synthetic-512", "whole"]
    assert train(runs, "--name=whole", mistake, "--overwrite").returncode == 2
    assert contents(finished) == before


def test_a_run_on_nothing_but_forget_data_is_warned_of(finished: Path, tmp_path: Path):
    corpus = f"--data.path={finished.parent / 'synthetic-512'}"
    forget = train(tmp_path, corpus, "--data.channel={retain: {'forget:es': 1}}")
    assert forget.returncode == 0 and "warning: nothing in split train is retain" in forget.stdout


def test_a_finished_run_says_so(finished: Path):
    done = sgtm("train", finished, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"{finished} is complete: all of its {STEPS} steps were trained before" in " ".join(done.stdout.split())


def test_other_settings_are_listed_with_both_values(finished: Path):
    done = sgtm("train", finished, "--resume", "--optimizer.lr=0.5", "--train.steps=9", "--train.log_every=2")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {finished}/checkpoints/step_{STEPS:08d} was written with other settings:",
        "  optimizer.lr: 0.001 in the checkpoint, 0.5 now",
        "  optimizer.warmup_steps: 1 in the checkpoint, 2 now, as 0.25 of train.steps",
        f"  train.steps: {STEPS} in the checkpoint, 9 now",
        f"sgtm train {finished} --resume takes those of the run; for others, set another --name",
        "the learning rate follows train.steps; to train on, export the run and start another from it with "
        "--train.init_from (docs/training.md)",
    ]


def test_report_and_evaluation(finished: Path):
    """The report shows the evaluation in training until there is another; that one has the corpus's counts, and prints
    those of the measured tokens."""
    assert sgtm("report", finished).returncode == 0
    page = (finished / "report/index.html").read_text("utf-8")
    assert f"of the evaluation in training after step {STEPS}" in page and "Removing <code>es</code>" in page
    done = sgtm("eval", finished, "--sequences=2")
    assert done.returncode == 0, done.stderr
    summary = json.loads((finished / "summary.json").read_text("utf-8"))
    manifest = Corpus.open(finished.parent / "synthetic-512").manifest
    assert set(summary["losses"]) == {"full", "without es"} and set(summary["losses"]["full"]) == {"en", "es"}
    for category in ("en", "es"):
        counts = {split: manifest.counts[split][category].tokens for split in ("train", "test")}
        assert {split: summary["counts"][split][category]["tokens"] for split in counts} == counts
        assert f"{counts['train']:,}" in done.stdout
    measured = {category: counts["tokens"] for category, counts in summary["measured"].items()}
    assert measured == {"en": 128, "es": 128}, "two sequences of 64"
    assert [line.split()[-1] for line in done.stdout.splitlines()[-2:]] == ["128", "128"]
