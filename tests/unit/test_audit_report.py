"""sgtm/audit/report.py: an audit as lines, as JSON, and as `sha256sum` takes it."""

import hashlib
from pathlib import Path

from sgtm.audit.audit import Audit
from sgtm.audit.check import Check
from sgtm.audit.report import as_json, chain_text, print_check, print_outcome

RECORD = {"removed": ["es", "fr"], "reduced": {}, "checkpoint": {"name": "step_00000007"}}


def audit(*checks: Check, record: dict = RECORD) -> Audit:
    return Audit(Path("safe"), Path("run"), record, list(checks), [("ab" * 32, Path("safe/README.md"))])


def test_a_check_is_a_line_and_each_problem_one_below(capsys):
    print_check(Check("files", "about", ["first", "second"]))
    print_check(Check("losses", "about", skipped="no corpus"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["files", "FAILED", "about"]
    assert [line.strip() for line in lines[1:3]] == ["- first", "- second"]
    assert lines[3].split() == ["losses", "skipped", "about", "(no", "corpus)"]


def test_the_outcome_names_what_the_folder_is(capsys):
    print_outcome(audit(Check("files", "a"), Check("losses", "b", skipped="no corpus")))
    text = capsys.readouterr().out
    assert "safe is run without es, fr, step_00000007\n" in text and "not checked: losses\n" in text
    assert text.endswith(f"{'ab' * 32}  safe/README.md\n") and "NOT" not in text
    print_outcome(audit(Check("files", "a", ["x", "y"]), Check("facts", "b", ["z"])))
    assert "safe is NOT the export of run that it claims to be: 3 problems" in capsys.readouterr().out
    print_outcome(audit(record={**RECORD, "removed": [], "reduced": {"es": 0.5}}))
    assert "not a safe model: it holds es\n" in capsys.readouterr().out


def test_the_chain_is_as_sha256sum_writes_it(tmp_path):
    """tests/processes/test_audit_chain.py runs it."""
    (tmp_path / "a file").write_bytes(b"content")
    made = Audit(tmp_path, tmp_path, RECORD, [], [(hashlib.sha256(b"content").hexdigest(), tmp_path / "a file")])
    text = chain_text(made)
    assert text == f"{hashlib.sha256(b'content').hexdigest()}  {tmp_path}/a file\n"


def test_json_has_everything():
    record = as_json(audit(Check("files", "about", ["x"])))
    assert record["passed"] is False and record["removed"] == ["es", "fr"]
    assert record["checks"] == [
        {"name": "files", "outcome": "FAILED", "about": "about", "problems": ["x"], "skipped": ""}
    ]
    assert record["chain"] == [{"sha256": "ab" * 32, "file": "safe/README.md"}]
