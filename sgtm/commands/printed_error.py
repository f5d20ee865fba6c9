"""A user's mistake as one message, from one of the ranks, and under torchrun as the last lines on the screen."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path


def print_error(error: ValueError | OSError) -> None:
    """One message. What every rank finds alike (a config) only rank 0 says, what all raise together (`error.rank`, see
    sgtm/distributed/agree.py) the rank that it comes from; anything else each rank says for itself.
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
