"""`environment.jsonl` of a run directory: device, threads, commit, versions and time of every start of the run."""

from __future__ import annotations

import json
from pathlib import Path

FILE = "environment.jsonl"


def record_environment(run: Path) -> None:
    """Append a line for this start."""
    from sgtm_kernels.measurement import environment  # torch, which a reader does without

    with (run / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(environment()) + "\n")


def last_environment(run: Path) -> dict | None:
    """The last line, of the newest start. None for a run of an older version."""
    try:
        return json.loads((run / FILE).read_text("utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return None
