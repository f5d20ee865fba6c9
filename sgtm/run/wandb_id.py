"""Which wandb run a run directory writes to, and how far: `wandb.id` in it.

    {"id": "1a2b3c4d", "directory": "/home/me/runs/mine", "logged": {"step": 80, "eval": 75}}

directory  where the run was when this was written. A directory that has the id of another one, which is still there, is
           a copy of it and gets an id of its own: two runs never write to one. A run that was moved keeps its id.
logged     last step by kind of line that wandb has. A run that is resumed from an earlier checkpoint trains these steps
           again, to the same values, and does not send them again.

Older files hold the id alone.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sgtm.files import write_atomically

FILE = "wandb.id"
SENT = ("step", "eval", "probe")
"""Lines of the log that wandb gets; checkpoints come later, out of its order."""


def claim(run: Path, lines: list[dict], write: Callable[[str], None]) -> tuple[str, dict[str, int]]:
    """(id, logged) of this directory, written to it.

    lines  of the log before those after the checkpoint are dropped: what earlier starts have sent
    write  takes a line for the user where the directory is a copy
    """
    directory, record = str(run.resolve()), _read(run)
    if record is not None and (original := _copied_from(record, run)):
        write(f"{run} is a copy of {original}: it gets a wandb run of its own")
        record = None
    if record is None:
        record = {"id": secrets.token_hex(4), "logged": {}}
    else:
        for line in lines:
            if line["kind"] in SENT:
                record["logged"][line["kind"]] = max(line["step"], record["logged"].get(line["kind"], 0))
    write_atomically(run / FILE, json.dumps({**record, "directory": directory}) + "\n")
    return record["id"], record["logged"]


def _read(run: Path) -> dict | None:
    """What the file of a directory holds; None where there is none."""
    with suppress(OSError):
        text = (run / FILE).read_text("utf-8").strip()
        if not text.startswith("{"):
            return {"id": text, "logged": {}} if text else None
        try:
            record = json.loads(text)
            return {"id": str(record["id"]), "directory": str(record["directory"]), "logged": dict(record["logged"])}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{run / FILE} is damaged; put back a copy, or delete it for a new wandb run") from None
    return None


def _copied_from(record: dict, run: Path) -> Path | None:
    """The directory that had this id first, if it is another one and still has it."""
    original = Path(record.get("directory", run))
    if not original.is_dir() or original.samefile(run):
        return None
    try:
        theirs = _read(original)
    except ValueError:
        return None
    return original if theirs is not None and theirs["id"] == record["id"] else None
