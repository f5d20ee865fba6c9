"""`sgtm explain`."""

from __future__ import annotations

from sgtm.commands.options import Subcommands


def add(commands: Subcommands) -> None:
    commands.add_configured("explain", run, "show which parameters each label updates, and how many")


def run(options) -> None:
    from sgtm.config import load_config

    config = load_config(options.config, options.overrides)

    from sgtm.estimate.explain import print_explanation

    print_explanation(config)
