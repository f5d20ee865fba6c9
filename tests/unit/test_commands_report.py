"""`sgtm report`: the page of a run, and the comparison with baselines before it."""

import shutil
from pathlib import Path

from sgtm.commands.main import main


def test_the_page_of_a_run_is_written(calls, run):
    assert main(["report", str(run)]) == 0
    assert calls == [("write_report", (run, None), {})]


def test_a_report_with_a_baseline_compares_before_it_writes(calls, run, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(run / "config.yaml", other)
    assert main(["report", str(run), "--baseline", str(other)]) == 2
    assert "was not evaluated: " in capsys.readouterr().err and not calls
    assert main(["report", str(run), "--baseline", str(tmp_path / "no")]) == 2
    assert f"{tmp_path / 'no'}: not a run directory" in capsys.readouterr().err and not calls
    monkeypatch.setattr("sgtm.report.compare", lambda run, others: ("compared", others))
    monkeypatch.setattr("sgtm.report.print_comparison", lambda comparison: calls.append(comparison))
    assert main(["report", str(run), "--baseline", str(other)]) == 0
    assert calls == [comparison := ("compared", [other]), ("write_report", (run, comparison), {})]


def test_a_sweep_has_a_page_of_its_own(calls, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sgtm.sweep.study.read_study", lambda path: f"study of {path.name}")
    monkeypatch.setattr("sgtm.sweep.page.write_study", lambda study, folder: calls.append((study, folder)))
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "table.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(folder)]) == main(["report", str(folder), "--out", "there"]) == 0
    assert main(["report", str(folder / "table.jsonl")]) == 0
    assert calls == [
        ("study of sweep", folder / "report"),
        ("study of sweep", Path("there")),
        ("study of table.jsonl", Path("table-report")),
    ]
    assert main(["report", str(folder), "--baseline", str(folder)]) == 2
    assert "--baseline belongs to the page of a run" in capsys.readouterr().err


def test_the_page_of_a_run_has_its_place(calls, run, capsys):
    assert main(["report", str(run), "--out", "there"]) == 2
    assert "--out is for the page of a sweep" in capsys.readouterr().err and not calls
