"""`unlearned.json` of a run directory that `sgtm unlearn` has made: from which run, and how.

method      of sgtm/unlearning/methods.py
options     its own, by name; steps, lr, seed, batch (sequences of forget and of retain text in a step)
domain      what was to be unlearned; forget, retain: categories whose text was read, of the split train
source      run (its name), checkpoint, step, manifest_sha256 of that checkpoint, and, where that run was itself
            unlearned, its `unlearned`
"""

from __future__ import annotations

import json
from pathlib import Path

from sgtm.files import write_atomically
from sgtm.words import counted

FILE = "unlearned.json"


def write_unlearned(run: Path, record: dict) -> None:
    write_atomically(run / FILE, json.dumps(record, indent=1) + "\n")


def read_unlearned(run: Path | str) -> dict | None:
    """None for a run that was trained. Raises ValueError for a damaged file."""
    file = Path(run) / FILE
    try:
        record = json.loads(file.read_text("utf-8"))
        described(record)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); unlearn the run again") from None
    return record


def described(record: dict) -> str:
    """One sentence; code words in backticks."""
    options = ", ".join(f"{name} {value:g}" for name, value in record["options"].items())
    source = record["source"]
    return (
        f"Unlearned: `{record['domain']}` by `{record['method']}`{f' ({options})' if options else ''}, "
        f"{counted(record['steps'], 'step')} at learning rate {record['lr']:.3g}, seed {record['seed']}, from run "
        f"`{source['run']}` after step {source['step']:,}."
    )
