"""`sgtm config`."""

from __future__ import annotations

from sgtm.commands.options import Subcommands


def add(commands: Subcommands) -> None:
    parser = commands.add_configured("config", run, "print a config with every key, or list the presets", nargs="?")
    parser.add_argument("--markdown", action="store_true", help="print the reference of all keys instead")


def run(options) -> None:
    from sgtm.config import Config, load_config, preset_names
    from sgtm.config.load import dump_config
    from sgtm.config.reference import markdown

    if options.markdown:
        print(markdown(Config), end="")
    elif options.config is None:
        print("\n".join(preset_names()))
    else:
        print(dump_config(load_config(options.config, options.overrides)), end="")
