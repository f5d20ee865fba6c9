"""README and docs hold the numbers of the committed results files, and no others."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_documents_are_current():
    command = [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").rglob("*.jsonl")), ids=lambda p: p.stem)
def test_rows_name_a_commit(path):
    """Without changes on top ("-dirty"), and one of this history where it is at hand."""
    shallow = _git("rev-parse", "--is-shallow-repository")
    for row in map(json.loads, path.read_text().splitlines()):
        for commit in row["commit"].split(", "):
            assert re.fullmatch(r"[0-9a-f]{7,40}", commit), commit
            if shallow.stdout.strip() == "false":
                assert _git("merge-base", "--is-ancestor", commit, "HEAD").returncode == 0, commit


def test_one_command_runs_all_in_their_order(benchmarks, monkeypatch, tmp_path, capsys):
    import experiments

    commands = "echo NOVELS >> runs.txt\nfalse\necho never >> runs.txt"
    monkeypatch.setitem(experiments.EXPERIMENTS, "mine", experiments.Experiment("Mine", "Does it?", commands))
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my novels").mkdir()
    monkeypatch.setattr("sys.argv", ["experiments.py", "mine", "--novels", "my novels"])
    assert experiments.main() == 1  # as the second command, after which nothing is run
    assert (tmp_path / "runs.txt").read_text() == f"{tmp_path / 'my novels'}\n"
    for more, message in (([], "mine takes --novels FOLDER"), (["--novels", "none"], "--novels: no folder")):
        monkeypatch.setattr("sys.argv", ["experiments.py", "mine", *more])
        with pytest.raises(SystemExit):
            experiments.main()
        assert message in capsys.readouterr().err


def _git(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
