"""The command line: `sgtm prepare | train | eval | examine | tamper | unlearn | adapt | export | audit | report | ...`.

Thin: every command (a file of this folder) declares its options, calls one function elsewhere and prints where the
result is. What is heavy is imported when a command runs, so `sgtm --help` and most mistakes are answered at once. A
user's mistake (ValueError, OSError) is one message on stderr and exit status 2; `SGTM_TRACEBACK=1` shows where it came
from. If the reader of a pipe ends (`sgtm explain debug | head`), the command ends too and prints nothing.
"""

from __future__ import annotations

import argparse
import os
import select
import shlex
import sys
from contextlib import nullcontext

from sgtm.commands import (
    adapt,
    audit,
    bench,
    checkpoint,
    compare,
    config,
    demo,
    direction,
    doctor,
    estimate,
    eval,
    examine,
    explain,
    export,
    generate,
    launch,
    prepare,
    profile,
    quickstart,
    report,
    sweep,
    tamper,
    train,
    unlearn,
)
from sgtm.commands.errors import print_error, what_is_meant
from sgtm.commands.options import Subcommands
from sgtm.process.ranks import launcher, rank_and_size
from sgtm.process.signals import Stopped, stoppable

COMMANDS = (
    prepare, train, eval, examine, tamper, unlearn, adapt, direction, export, audit, generate, compare, demo, report,
    checkpoint, explain, bench, profile, estimate, launch, sweep, doctor, config, quickstart,
)  # fmt: skip
OLD_NAMES = {"plan": "estimate"}  # accepted until 0.3
RESUMED = ("prepare", "sweep", "tamper")  # by the same command
# They write files of their own, or print or serve what one model computes.
ONE_PROCESS = (
    "prepare",
    "quickstart",
    "eval",
    "examine",
    "tamper",
    "unlearn",
    "adapt",
    "direction",
    "export",
    "audit",
    "generate",
    "compare",
    "demo",
    "report",
    "checkpoint",
    "sweep",
)
STOPPABLE = (*ONE_PROCESS, "train", "profile")


def main(argv: list[str] | None = None) -> int:
    """Run one command. Exit status: 0; 1 if stdout is a closed pipe; 2 for a mistake; 128 plus a signal's number."""
    try:
        arguments = _without_local_rank(sys.argv[1:] if argv is None else argv)
        status = _dispatch(arguments)
        sys.stdout.flush()  # a closed pipe shows here, and not in the interpreter's own flush at exit
        return status
    except Stopped as stopped:
        # A launcher ends the other ranks when one fails, and rank 0 may have more to close; it has its own status.
        return stopped.status if _only_rank() else 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 1
        if os.environ.get("SGTM_TRACEBACK", "0") not in ("", "0"):
            raise
        print_error(error)
        return 2


def run() -> int:
    """The command line as a process of its own, which may end here: see `end_rank`."""
    status = 1
    try:
        status = main()
    except Exception:
        sys.excepthook(*sys.exc_info())  # the interpreter may not come to it
    finally:
        if "sgtm.distributed.process_group" in sys.modules:  # else no group was joined, and torch may not be loaded
            from sgtm.distributed.process_group import end_rank

            end_rank(status)
    return status


def _dispatch(argv: list[str]) -> int:
    overrides: list[str] = []
    if argv and argv[0] in ("train", "launch"):
        argv = _without_auto(argv)
    if argv and argv[0] in OLD_NAMES:
        print(f"note: sgtm {argv[0]} is now sgtm {OLD_NAMES[argv[0]]}", file=sys.stderr)
        argv = [OLD_NAMES[argv[0]], *argv[1:]]
    parser, configured = _parser()
    if argv and argv[0] in configured:
        argv, overrides = split_overrides(argv)
    if not argv:
        parser.print_help()
        return 0
    options, rest = parser.parse_known_args(argv)
    if rest:
        from sgtm.config.load import QUOTES

        list_cut_up = overrides and not any(argument.startswith("-") for argument in rest)
        hint = what_is_meant(argv[0], rest, QUOTES if list_cut_up else "") if argv[0] in configured else ""
        getattr(options, "error", parser.error)(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if argv[0] in ONE_PROCESS and launcher() in ("torchrun", "deepspeed", "srun") and not _only_rank():
        from sgtm.config import ConfigError

        raise ConfigError(f"sgtm {argv[0]} runs as one process; start it without {launcher()}")
    if hasattr(options, "config"):
        options.overrides = overrides
    # Of several ranks each ends by the signal itself: the launcher then ends the others, which may wait for it.
    with stoppable(_go_on([*argv, *overrides])) if argv[0] in STOPPABLE and _only_rank() else nullcontext():
        return options.run(options) or 0


def _go_on(argv: list[str]) -> str:
    how = "finished work is kept; continue" if argv[0] in RESUMED else "again"
    return f"{how}: {shlex.join(['sgtm', *argv])}"


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """(arguments, overrides): `--a.b VALUE`, `--a.b=VALUE` and top-level keys of the config are overrides."""
    from sgtm.config.load import is_override

    rest, overrides, pending = [], [], False
    for argument in argv:
        if is_override(argument):
            overrides.append(argument)
            pending = "=" not in argument
        elif pending:
            overrides.append(argument)
            pending = False
        else:
            rest.append(argument)
    return rest, overrides


def _parser() -> tuple[argparse.ArgumentParser, set[str]]:
    """The parser, and the commands that take keys of the configuration as options."""
    from sgtm import __version__

    parser = argparse.ArgumentParser(
        prog="sgtm",
        description="Pretraining with Selective GradienT Masking: what labelled data teaches can be removed again.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sgtm {__version__}")
    commands = Subcommands(parser)
    for module in COMMANDS:
        module.add(commands)
    return parser, commands.configured


def _without_local_rank(argv: list[str]) -> list[str]:
    """The deepspeed launcher adds `--local_rank=N`; the environment has the same."""
    arguments, skip = [], False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        if skip:
            skip = False
        elif name in ("--local_rank", "--local-rank"):
            skip = not equals
        else:
            arguments.append(argument)
    return arguments


def _without_auto(argv: list[str]) -> list[str]:
    """`--resume auto` is `--resume`, which takes a run in whatever state it is."""
    arguments: list[str] = []
    for argument in argv:
        if argument == "--resume=auto":
            arguments.append("--resume")
        elif not (argument == "auto" and arguments[-1] == "--resume"):
            arguments.append(argument)
    return arguments


def _only_rank() -> bool:
    return rank_and_size()[1] == "1"


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has gone, so that no other broken pipe passes for it.

    If so, what is still buffered goes nowhere, or the interpreter would fail on it at exit.
    """
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone
