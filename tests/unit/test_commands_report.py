"""`sgtm report`: the page of a run, and the comparison with baselines before it."""

import shutil

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
