"""`sgtm export`: the domains that it removes, in every spelling of a list."""

import pytest

from sgtm.commands.main import main

DEFAULTS = {"strengths": {}, "prune": True, "dtype": "fp32", "shard": 2_000_000_000}


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
    assert calls == [("export_run", (tmp_path, domains, tmp_path / "out", "copy"), DEFAULTS)]


def test_strengths_form_dtype_and_size_of_files_reach_the_export(calls, tmp_path):
    (tmp_path / "config.yaml").write_text("extends: debug\n")
    options = ["--strength", "bio=0.5", "a=b=0.25", "--zeroed", "--dtype", "bf16", "--shard", "0.5"]
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out"), *options]) == 0
    changed = {"strengths": {"bio": 0.5, "a=b": 0.25}, "prune": False, "dtype": "bf16", "shard": 500_000_000}
    assert calls == [("export_run", (tmp_path, [], tmp_path / "out", None), changed)]


@pytest.mark.parametrize("strength", ["bio", "=0.5", "bio=1", "bio=0", "bio=half", "bio=-1"])
def test_a_strength_is_a_domain_and_a_share(tmp_path, capsys, strength):
    (tmp_path / "config.yaml").write_text("extends: debug\n")
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path), "--out", str(tmp_path / "out"), "--strength", strength])
    assert f"expected DOMAIN=S with S above 0 and below 1, got {strength!r}" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "start"), [("export", "RUN --out DIR"), ("report", "RUN|SWEEP [--baseline")])
def test_the_usage_begins_with_the_run(capsys, command, start):
    """An option that takes several values would take the run too."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: sgtm {command} {start}")
