"""`unlearned.json` of a run directory that `sgtm unlearn` has made: from which run, and how.

method      of sgtm/unlearning/methods.py
options     its own, by name; steps, lr, seed, batch (sequences of forget and of retain text in a step)
domain      what was to be unlearned; forget, retain: categories whose text was read, of the split train
source      run (its name), checkpoint, step, manifest_sha256 of that checkpoint, and, where that run was itself
            unlearned, its `unlearned`
"""

from __future__ import annotations

from pathlib import Path

from sgtm.run.origin import read_record, write_record
from sgtm.words import counted

FILE = "unlearned.json"


def write_unlearned(run: Path, record: dict) -> None:
    write_record(run / FILE, record)


def read_unlearned(run: Path | str) -> dict | None:
    """None for a run that was trained. Raises ValueError for a damaged file."""
    return read_record(Path(run) / FILE, described, "unlearn the run again")


def described(record: dict) -> str:
    """One sentence; code words in backticks."""
    options = ", ".join(f"{name} {value:g}" for name, value in record["options"].items())
    source = record["source"]
    return (
        f"Unlearned: `{record['domain']}` by `{record['method']}`{f' ({options})' if options else ''}, "
        f"{counted(record['steps'], 'step')} at learning rate {record['lr']:.3g}, seed {record['seed']}, from run "
        f"`{source['run']}` after step {source['step']:,}."
    )
