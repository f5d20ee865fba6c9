"""`sgtm doctor`."""

from __future__ import annotations

from sgtm.commands.options import OVERRIDES, SOURCE, Subcommands


def add(commands: Subcommands) -> None:
    about = "versions, devices, kernel backends, and what is missing for what"
    parser = commands.add("doctor", run, about, epilog=f"With --check: {OVERRIDES[0].lower()}{OVERRIDES[1:]}")
    parser.add_argument("--json", action="store_true", help="as JSON")
    about = "also run the kernels of this config (default: quickstart) against the reference; status 1 on failure"
    parser.add_argument("--check", dest="config", nargs="?", const="quickstart", metavar=SOURCE, help=about)
    commands.configured.add("doctor")


def run(options) -> int:
    from sgtm.config import load_config

    if options.overrides and not options.config:
        raise ValueError(f"{options.overrides[0]} is a key of a config, which only --check takes")
    check = load_config(options.config, options.overrides) if options.config else None

    from sgtm.measure.doctor import print_findings

    return print_findings(as_json=options.json, check=check)
