"""`sgtm audit`: its exit status, its JSON, and the file of hashes."""

import json

import pytest
from audited import evaluated_run

from sgtm.audit.audit import CHECKS
from sgtm.commands import audit
from sgtm.commands.main import main
from sgtm.hf.card import RECORD
from sgtm.hf.export import CARD, export_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = evaluated_run(tmp_path_factory.mktemp("command"), "llama")
    export_run(run, ["es"], run.parent / "safe")
    return run


def words(run, *more: str) -> list[str]:
    return ["audit", str(run.parent / "safe"), "--against", str(run), "--skip", "logits", "losses", *more]


def test_checks_are_lines_and_the_status_is_0(run, capsys, tmp_path):
    assert main(words(run, "--chain", str(tmp_path / "SHA256SUMS"))) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()[: len(CHECKS)]] == list(CHECKS)
    assert "not checked: logits, losses" in text and text.endswith((tmp_path / "SHA256SUMS").read_text())


def test_json_is_all_that_is_printed(run, capsys):
    assert main(words(run, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"] is True and len(printed["checks"]) == len(CHECKS)


def test_a_changed_folder_has_status_1(run, capsys):
    card = run.parent / "safe" / CARD
    before = card.read_text()
    card.write_text("# safe")
    try:
        assert main(words(run)) == 1
    finally:
        card.write_text(before)
    assert "is NOT the export" in capsys.readouterr().out


def test_a_replay_that_is_no_test_is_in_the_json(run, capsys):
    assert main(words(run, "--json", "--replay", "3")) == 1
    *others, last = json.loads(capsys.readouterr().out)["checks"]
    assert all(check["outcome"] != "FAILED" for check in others)
    assert last["name"] == "replay" and "is not certified for es" in last["problems"][0]


def test_a_chain_overwrites_nothing_that_is_read(run, capsys):
    record = run.parent / "safe" / RECORD
    before = record.read_bytes()
    for file in (record, run / "SHA256SUMS"):
        assert main(words(run, "--chain", str(file))) == 2
        assert f"--chain {file} would change " in capsys.readouterr().err
    assert record.read_bytes() == before and not (run / "SHA256SUMS").exists()


def test_a_folder_that_is_none_has_status_2(run, capsys, tmp_path):
    assert main(["audit", str(tmp_path), "--against", str(run)]) == 2
    assert "sgtm_export.json is missing" in capsys.readouterr().err
    assert main(["audit", str(run.parent / "safe"), "--against", str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err


def test_the_names_of_checks_are_those_of_the_audit():
    assert tuple(CHECKS) == audit.CHECKS
