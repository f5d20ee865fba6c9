"""benchmarks/checkpoints.py writes what report.py reads."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_rows_and_their_table(tmp_path: Path, monkeypatch):
    file, script = tmp_path / "checkpoints.jsonl", ROOT / "benchmarks" / "checkpoints.py"
    command = [sys.executable, script, "--preset", "debug", "--rounds", "2", "--threads", "1", "--json", file]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["checkpoint"] for row in rows] == ["asynchronous", "waited for"]
    for row in rows:
        assert row["mib"] > 0.3 and row["rounds"] == 2 and row["setting"] == "debug, batch 4 x 64, fp32"
        assert 0 < row["paused"]["p50"] <= row["written"]["p50"]
        step = row["step"]["p50"]
        assert row["share"]["100"] == pytest.approx(row["lost"]["p50"] / (100 * step), abs=1e-4 / step)
    assert {path.name for path in tmp_path.iterdir()} == {file.name}, "the run is deleted"

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("report_of_checkpoints", ROOT / "benchmarks" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    text = report.checkpoints(report.read_rows(file))
    assert text.startswith("### What a checkpoint costs") and "| every 10 | every 50 |" in text
    assert "\n| asynchronous | " in text and "\n| waited for | " in text
