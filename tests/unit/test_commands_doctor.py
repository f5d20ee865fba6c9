"""`sgtm doctor`: the config that is checked, and the exit status."""

import pytest

from sgtm.commands.main import main


@pytest.mark.parametrize(
    ("arguments", "as_json", "name", "status"),
    [
        ([], False, None, 0),
        (["--json"], True, None, 0),
        (["--check"], False, "quickstart", 0),
        (["--check", "debug", "--train.steps", "9"], False, "debug", 1),
    ],
)
def test_doctor_checks_the_config_that_is_named_and_returns_the_status(arguments, as_json, name, status, monkeypatch):
    noted = []

    def print_findings(as_json, check):
        noted.append((as_json, check))
        return status

    monkeypatch.setattr("sgtm.measure.doctor.print_findings", print_findings)
    assert main(["doctor", *arguments]) == status
    ((printed_as_json, check),) = noted
    assert printed_as_json == as_json and (check and check.name) == name
    assert name != "debug" or check.train.steps == 9
