"""Rows of measurements in a file to which every finished row is appended at once.

A journal survives SIGKILL at any moment: a row is one JSON object on a line, written and synced before `add` returns,
and a last line that a killed writer left unfinished is dropped by the next one. Needs no package.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ENVIRONMENT = "environment.json"  # in the folder of a run: commit, device and versions, for every row
OK, FAILED = "ok", "failed"
AGAIN = "again"  # outcome of a failed item that is to be measured again


class Journal:
    """One file of rows.

    shared  fields of every row; None: those in `environment.json` beside the file, where there is one
    """

    def __init__(self, path: Path, shared: dict | None = None):
        self.path = path
        beside = path.parent / ENVIRONMENT
        self.shared = shared if shared is not None else json.loads(beside.read_text()) if beside.exists() else {}

    def add(self, *rows: dict) -> None:
        """Append these rows, each with the shared fields and the time (UTC); on the disk when this returns."""
        stamp = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        if not rows:
            return
        text = "".join(json.dumps({**row, **self.shared, **stamp}) + "\n" for row in rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            _drop_torn_line(file)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict]:
        """All finished rows; empty where the file is missing."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is not finished
        return [json.loads(line) for line in lines if line]


def _drop_torn_line(file) -> None:
    size = file.seek(0, os.SEEK_END)
    if not size:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)


def last_by(rows: Sequence[dict], *keys: str) -> list[dict]:
    """The last row for each combination of these fields, in the order in which the combinations first occur."""
    return list({tuple(row.get(key) for key in keys): row for row in rows}.values())


def failure(error: BaseException) -> dict:
    """Fields of a row whose measurement raised: the error, and where it was raised."""
    frames, traceback = [], error.__traceback__
    while traceback is not None:
        frames.append(f"{Path(traceback.tb_frame.f_code.co_filename).name}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return {"outcome": FAILED, "error": f"{type(error).__name__}: {error}"[:1000], "at": frames[-6:]}


class Items:
    """The items of a script, measured one after another, each once however often the script is started.

    An item is finished when the journal has rows with its name, even of a failure. Before an item begins, its name is
    written to the file that `SGTM_GPU_ITEM` names, where the driver reads which item crashed or hung. `healthy` is
    called after a failure: if it returns False (a CUDA context does not survive an illegal access) the process exits
    with status `RESTART`.
    """

    RESTART = 75

    def __init__(self, journal: Journal | None, healthy: Callable[[], bool] = lambda: True):
        self.journal, self.healthy = journal, healthy
        rows = journal.rows() if journal else []
        outcomes = {row["item"]: row.get("outcome", OK) for row in rows if "item" in row}
        self.finished = {item for item, outcome in outcomes.items() if outcome != AGAIN}
        current = os.environ.get("SGTM_GPU_ITEM")
        self.current = Path(current) if current else None

    def measure(self, item: str, function: Callable[[], list[dict]]) -> list[dict]:
        """Rows of `function`, or of its failure, written with the item's name; none where it was finished before."""
        if item in self.finished:
            return []
        if self.current:
            self.current.write_text(item)
        try:
            rows = [{"item": item, "outcome": OK} | row for row in function()]
        except Exception as error:
            rows = [{"item": item} | failure(error)]
        if self.journal:
            self.journal.add(*rows)
        self.finished.add(item)
        if self.current:
            self.current.unlink()
        for row in rows:
            if row["outcome"] == FAILED:
                print(f"{item}: {row['error']}", flush=True)
        if rows[-1]["outcome"] == FAILED and not self.healthy():
            raise SystemExit(self.RESTART)
        return rows
