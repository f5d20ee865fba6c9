"""`sgtm checkpoint`."""

from __future__ import annotations

import sys
from pathlib import Path

from sgtm.commands.options import Subcommands


def add(commands: Subcommands) -> None:
    parser = commands.add("checkpoint", run, "verify the checkpoints of a run, or write one for other programs")
    tasks = parser.add_subparsers(metavar="verify|reshape", required=True, dest="task")
    about = "compare every file with its size and SHA-256; exit status 1 if any differs"
    verify = tasks.add_parser("verify", help=about, description=about, allow_abbrev=False)
    verify.add_argument("source", type=Path, metavar="RUN|CHECKPOINT", help="run directory, or one checkpoint of it")
    about = (
        "write a checkpoint as DeepSpeed's universal checkpoint, whole tensors by parameter; to resume a run on "
        "other ranks or in another ZeRO stage it is not needed: sgtm train RUN --resume"
    )
    reshape = tasks.add_parser("reshape", help=about, description=about, allow_abbrev=False)
    reshape.add_argument("source", type=Path, metavar="RUN|CHECKPOINT", help="a run's newest valid one, or this one")
    reshape.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")


def run(options) -> int:
    """Exit status: 1 where `verify` finds damage."""
    from sgtm.run.checkpoint import checkpoints_at, newest_whole, none_whole, verify

    checkpoints = checkpoints_at(options.source)
    if options.task == "verify":
        whole = [_is_whole(directory, verify) for directory in checkpoints]
        return int(not all(whole))
    newest, wrong = newest_whole(checkpoints)
    if newest is None:
        raise ValueError(none_whole(wrong))
    for problem in wrong.values():
        print(f"warning: {problem}; taking {newest}", file=sys.stderr)

    from sgtm.distributed.universal import write_universal

    write_universal(newest, options.out)
    print(options.out)
    return 0


def _is_whole(directory: Path, verify) -> bool:
    try:
        verify(directory)
    except ValueError as error:
        print(f"{directory}: damaged: {error}")
        return False
    print(f"{directory}: valid")
    return True
