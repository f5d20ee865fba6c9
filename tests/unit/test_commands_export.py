"""`sgtm export`: the domains that it removes, in every spelling of a list."""

import pytest

from sgtm.commands.main import main


@pytest.mark.parametrize(
    ("remove", "domains"),
    [
        (["es"], ["es"]),
        (["bio,med"], ["bio", "med"]),
        (["bio", "med"], ["bio", "med"]),
        (["bio,", "med"], ["bio", "med"]),
    ],
)
def test_the_domains_to_remove_may_be_separated_by_spaces_or_commas(calls, tmp_path, remove, domains):
    (tmp_path / "config.yaml").write_text("extends: debug\n")
    where = ["--out", str(tmp_path / "out"), "--data.path", "copy"]
    assert main(["export", str(tmp_path), "--remove", *remove, *where]) == 0
    assert calls == [("export_run", (tmp_path, domains, tmp_path / "out", "copy"), {})]


@pytest.mark.parametrize(("command", "start"), [("export", "RUN --out DIR"), ("report", "RUN|SWEEP [--baseline")])
def test_the_usage_begins_with_the_run(capsys, command, start):
    """An option that takes several values would take the run too."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: sgtm {command} {start}")
