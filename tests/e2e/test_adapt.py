"""`sgtm adapt` on a filtered run: evaluation, report and tampering take the result, training refuses to resume it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def sgtm(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "sgtm", *map(str, arguments)], capture_output=True, text=True)


def succeeded(*arguments: object) -> subprocess.CompletedProcess:
    done = sgtm(*arguments)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """`filtered`, trained without the domain, and `adapted`."""
    runs = tmp_path_factory.mktemp("runs")
    options = ("--masking.strategy=none", "--data.upsample={es: 0}")
    succeeded("train", "debug", f"--runs={runs}", "--name=filtered", *options)
    done = succeeded("adapt", runs / "filtered", "--out", runs / "adapted", "--steps", 12)
    assert "next: sgtm eval" in done.stdout and "warning" not in done.stderr and "Adapted: es by" in done.stderr
    return runs


def evaluated(run: Path) -> dict:
    printed = succeeded("eval", run, "--sequences=4").stdout
    summary = json.loads((run / "summary.json").read_text())
    assert ("Adapted: es by adapters of rank 16" in printed) == ("adapted" in summary)
    return summary


def test_without_the_domain_the_losses_are_those_of_the_source(runs: Path):
    before, after = evaluated(runs / "filtered"), evaluated(runs / "adapted")
    assert set(after["losses"]) == {"full", "without es"} and set(before["losses"]) == {"full"}
    assert after["losses"]["without es"] == before["losses"]["full"]
    assert after["losses"]["full"]["es"] != before["losses"]["full"]["es"]
    succeeded("report", runs / "adapted")
    assert "Adapted: <code>es</code> by adapters of rank 16" in (runs / "adapted/report/index.html").read_text()


def test_tampering_begins_at_the_source(runs: Path):
    done = succeeded("tamper", runs / "adapted", "--data", "forget", "--steps", 2, "--sequences", 4)
    rows = [json.loads(line) for line in (runs / "adapted/tamper.jsonl").read_text().splitlines()]
    assert {row["condition"] for row in rows} == {"without es"}, done.stdout


def test_it_is_not_resumed(runs: Path):
    done = sgtm("train", runs / "adapted", "--resume")
    assert done.returncode == 2 and "holds weights alone, without the optimizer's state" in done.stderr
