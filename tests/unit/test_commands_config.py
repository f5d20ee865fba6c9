"""`sgtm config`: presets, one config with every key, the reference of all keys."""

from sgtm.commands.main import main
from sgtm.config import Config, load_config, preset_names
from sgtm.config.load import dump_config
from sgtm.config.reference import markdown


def test_without_a_config_the_presets_are_listed(capsys):
    assert main(["config"]) == 0
    assert capsys.readouterr().out.splitlines() == preset_names()


def test_a_config_is_printed_with_every_key(capsys):
    assert main(["config", "debug", "--train.steps", "77"]) == 0
    printed = capsys.readouterr().out
    assert "  steps: 77\n" in printed and printed == dump_config(load_config("debug", ["--train.steps=77"]))


def test_the_reference_is_printed_as_markdown(capsys):
    assert main(["config", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown(Config)
