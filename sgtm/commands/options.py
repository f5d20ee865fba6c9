"""How commands and their options are declared."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

from sgtm.words import listed

OVERRIDES = "Any key of the configuration is an option: --train.steps 100 --masking.strategy none"
SOURCE = "PRESET|FILE.yaml"
MEANING = "preset (see sgtm config) or file"
DATA = "data of the run, where they are not in their old folder (default: data.path of the run)"


def check_output(option: str, file: Path, *read: Path) -> None:
    """Raises ValueError for a file to write whose folder does not exist, or that is part of what is read."""
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{option} {file}: there is no folder {file.parent}; make it")
    target = file.resolve()
    for source in (path.resolve() for path in read):
        if target == source or source in target.parents:
            raise ValueError(f"{option} {file} would change {source}; give a file elsewhere")


def natural(text: str) -> int:
    """The type of an option that is a whole number, 0 too."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 on, got {text!r}")
    return int(text)


def weight(text: str) -> float:
    """The type of an option that is a finite number, 0 too."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number from 0 on, got {text!r}")
    return value


class Parser(argparse.ArgumentParser):
    """A parser whose error explains a positional that an option with several values has taken."""

    arguments: tuple[str, ...] = ()

    def parse_known_args(self, args=None, namespace=None):
        self.arguments = tuple(args or ())
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        super().error(message + self._taken(message))

    def _taken(self, message: str) -> str:
        first = next((action.metavar for action in self._actions if not action.option_strings), None)
        if not isinstance(first, str) or not message.startswith("the following arguments are required:"):
            return ""
        if first not in message.partition(":")[2].strip().split(", "):
            return ""
        for action in self._actions:
            for name in action.option_strings if action.nargs == "+" else ():
                if name in self.arguments:
                    behind = self.arguments[self.arguments.index(name) + 1 :]
                    values = list(takewhile(lambda argument: argument[:1] != "-", behind))
                    if len(values) > 1:
                        return f"; {name} has taken {listed(values)}: put {first} first, or at the end after --"
        return ""


class Subcommands:
    """The subcommands of a parser. Names of those that take a config, and its keys as options, are in `configured`."""

    def __init__(self, parser: argparse.ArgumentParser):
        self._commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
        self.configured: set[str] = set()

    def add(self, name: str, run: Callable, about: str, **options) -> argparse.ArgumentParser:
        """A command; `run` takes the parsed options and returns the exit status, or None for 0."""
        parser = self._commands.add_parser(name, help=about, description=about, allow_abbrev=False, **options)
        parser.set_defaults(run=run, error=parser.error)
        return parser

    def add_configured(
        self,
        name: str,
        run: Callable,
        about: str,
        source: str = SOURCE,
        meaning: str = MEANING,
        nargs: str | None = None,
    ) -> argparse.ArgumentParser:
        """A command on a config: `options.config` is its source, `options.overrides` the keys on the command line."""
        parser = self.add(name, run, about, epilog=OVERRIDES)
        parser.add_argument("config", nargs=nargs, metavar=source, help=meaning)
        self.configured.add(name)
        return parser


def _above_zero(number_type: type, name: str, most: float = float("inf")) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = number_type(text)
        except ValueError:
            value = 0
        if not 0 < value <= most or value == float("inf"):
            limit = "" if most == float("inf") else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"expected a {name} above 0{limit}, got {text!r}")
        return value

    return number


COUNT, AMOUNT, SHARE = _above_zero(int, "whole number"), _above_zero(float, "number"), _above_zero(float, "share", 1.0)


def finite(text: str) -> float:
    """A number of either sign, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return value
