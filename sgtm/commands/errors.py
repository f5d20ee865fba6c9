"""How a user's mistake is printed: one message, from one of the ranks, under torchrun as the last lines on the screen.

An argument that no command has comes with those that it may be a slip of.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from sgtm.process.names import nearest

OPTIONS = {
    "train": ("resume", "overwrite"),
    "bench": ("rounds", "json", "peers", "tune"),
    "profile": ("steps", "out", "kernel", "no-trace"),
    "doctor": ("json", "check"),
    "estimate": ("nodes", "gpus", "memory", "tflops", "inside", "between", "reached", "sustained", "json"),
    "launch": ("launcher", "nodes", "gpus", "rendezvous", "hostfile", "memory", "resume", "overwrite", "dry-run"),
}


def what_is_meant(command: str, arguments: list[str], otherwise: str = "") -> str:
    """`; ` and the remedy, or `otherwise`, for arguments that a command does not take.

    A key of the config with one dash, without dashes or as a mapping of its section; `--steps` of `--train.steps`; a
    second preset or file.
    """
    from sgtm.config.reference import keys
    from sgtm.config.schema import Config

    first = arguments[0]
    names = [key.name for key in keys(Config)]
    key, equals, value = first.lstrip("-").partition("=")
    if key in names and first[:2] != "--" and (equals or first[:1] == "-"):
        return f"; write --{key} {value or 'VALUE'}"
    if inside := [name for name in names if first[:2] == "--" and name.startswith(f"{key}.")]:
        return f"; {key} is a section; write its keys one by one: --{inside[0]} VALUE"
    if otherwise:
        return otherwise
    if key == "preset":
        return "; write the preset without --preset"
    others = {option for options in OPTIONS.values() for option in options} - set(OPTIONS.get(command, ()))
    if first[:2] == "--" and key in others and key not in {name.rpartition(".")[2] for name in names}:
        return f"; {command} has no --{key}"
    known = {name: [f"--{name}"] for name in OPTIONS.get(command, ())}
    for name in names:
        known.setdefault(name.rpartition(".")[2], []).append(f"--{name}")
    options = [argument[2:].partition("=")[0] for argument in arguments if argument[:2] == "--"]
    meant = [option for word in options if (close := nearest(word, known)) for option in known[close]]
    if meant:
        return f"; did you mean {' or '.join(meant)}?"
    takes_one = command in ("train", "explain", "config", "bench", "profile", "estimate", "launch")
    return "" if not takes_one or first[:1] == "-" else f"; {command} takes one preset or file"


def print_error(error: ValueError | OSError) -> None:
    """Print one message.

    Rank 0 prints what every rank finds alike, such as an error in a config. What all raise together is printed by the
    rank that it comes from (`error.rank`, see sgtm/distributed/on_ranks.py). Every rank prints anything else.
    """
    from sgtm.process.ranks import rank_and_size

    rank, ranks = rank_and_size()
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{_decoded(error.filename)}: {error.strerror}" if error.filename is not None else error.strerror
    comes_from = getattr(error, "rank", rank)
    where = "" if ranks == "1" else f"rank {comes_from}: "
    _report_to_torchrun(f"error: {where}{text}")
    if str(comes_from) != rank:
        return
    if rank != "0":
        from sgtm.config import ConfigError

        if isinstance(error, ConfigError):
            return
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    print(f"{red}error:{plain} {where}{text}", file=sys.stderr)


def _decoded(name: str | bytes | int) -> str | int:
    return name if isinstance(name, int) else os.fsdecode(name)


def _report_to_torchrun(text: str) -> None:
    """Have torchrun end its own output, of thirty lines, with this error (torch.distributed.elastic, error files)."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # It shows the earliest, in whole seconds, and takes the ranks that it then ends for others of this second.
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": text, "timestamp": int(time.time()) - 1}), "utf-8")
