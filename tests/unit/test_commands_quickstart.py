"""`sgtm quickstart`: its stages, the baselines beside its losses, and which run it replaces."""

import pytest

from sgtm.commands.main import main
from sgtm.config.load import load_config, save_config


def test_quickstart_trains_evaluates_reports_and_prints(calls, capsys, tmp_path):
    assert main(["quickstart", "--train.steps", "60", "--runs", str(tmp_path)]) == 0
    stages = ["train", "evaluate_run", "write_summary", "print_summary", "write_report"]
    assert [function for function, _, _ in calls] == stages
    assert calls[0][1][0].name == "quickstart" and calls[0][1][0].train.steps == 60
    printed = capsys.readouterr().out
    assert "report: runs/quickstart/x.html" in printed and "next:" not in printed


def test_quickstart_prints_and_stores_the_shipped_baselines(calls, tmp_path):
    from sgtm.report.baselines import shipped_baselines

    baselines = shipped_baselines(load_config("quickstart"))
    assert main(["quickstart", "--runs", str(tmp_path)]) == 0
    summaries = {function: args[-1] for function, args, _ in calls if "summary" in function}
    assert list(baselines) == ["unmasked", "filtered"]
    assert summaries == {key: {"losses": {}, "baselines": baselines} for key in ("write_summary", "print_summary")}


@pytest.mark.parametrize(("stored", "overwrite"), [("quickstart", True), ("novels", False), (None, False)])
def test_quickstart_replaces_a_quickstart_and_nobodys_work(calls, tmp_path, capsys, stored, overwrite):
    name = stored or "novels"
    if stored:
        (tmp_path / name).mkdir()
        save_config(load_config("quickstart", ["--name", stored]), tmp_path / name / "config.yaml")
    refused = stored == "novels"
    assert main(["quickstart", "--name", name, "--runs", str(tmp_path)]) == (2 if refused else 0)
    assert (f"run directory {tmp_path / name} exists" in capsys.readouterr().err) == refused
    assert [options for _, _, options in calls[:1]] == ([] if refused else [{"overwrite": overwrite}])
