"""The folder that `prepare` writes: who may, what is in it already, and how a finished corpus is replaced.

The blocks of a job lie in a folder of their own, `blocks/<job>`. So one of another job never counts, not even one that
could not be deleted, or that a worker of a killed run puts in place when the next job has begun.

A corpus that replaces another is built in a folder inside it and takes its place when it is complete. So the old one
opens until then, whatever the new one's input, rules or vocabulary are refused for; a test kills it at every stage
(`tests/processes/test_prepare_resume.py`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sgtm.data.store import DOCUMENTS, LOCK, MANIFEST, SPANS, TOKENIZER, Corpus
from sgtm.files import write_atomically
from sgtm.words import listed

JOB, BLOCKS, REPLACEMENT = "job.json", "blocks", ".replacement"
_PARTS = ("shards", "tokenizer", DOCUMENTS, SPANS, JOB, MANIFEST)
"""What is moved, the manifest last."""


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One writer at a time; a second one waits, and then finds the corpus finished.

    Raises ValueError for a file, and for a folder with other files in it, which stays as it is.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file, but it takes a folder; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    if not any((out / name).exists() for name in (LOCK, MANIFEST)):
        _check_empty(out)
    with (out / LOCK).open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def stored_job(out: Path) -> dict | None:
    """What the folder was made from, as far as it got; None where nothing shows it."""
    try:
        return json.loads((out / JOB).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def blocks_of(folder: Path, job: dict) -> Path:
    """The folder of the blocks of this job, whose name is the beginning of the SHA-256 of the job."""
    return folder / BLOCKS / hashlib.sha256(json.dumps(job).encode()).hexdigest()[:16]


def same_job(one: dict | None, other: dict) -> bool:
    """Whether blocks may be shared. Order counts: blocks hold positions in the list of labels."""
    return json.dumps(one) == json.dumps(other)


def folder_to_build(out: Path, job: dict, shard_tokens: int, overwrite: bool) -> Path | None:
    """Where the corpus of this job is to be built, ready for it; None where `out` holds it already, intact.

    What an interrupted run of the same job left behind is kept, what another one did is cleared.

    Raises ValueError where `out` holds a corpus of another job and may not be overwritten, or something else, and
    OSError naming the file where what must go cannot be deleted.
    """
    if not (out / MANIFEST).is_file() and (out / REPLACEMENT / MANIFEST).is_file():
        put_in_place(out)  # a run was killed while it did
    folder = out
    if (out / MANIFEST).is_file():
        if same_job(stored_job(out), job):
            try:
                if Corpus.open(out).manifest.shard_tokens == shard_tokens:
                    clear(out)
                    return None
            except ValueError:
                overwrite = True  # it is damaged, and this is what it was made from
        if not overwrite:
            raise ValueError(
                f"{out} holds a corpus prepared from other {_differing(stored_job(out), job)}; choose another --out, "
                f"or replace it with --overwrite"
            )
        folder = out / REPLACEMENT
        folder.mkdir(exist_ok=True)
    _start_or_resume(folder, job)
    return folder


def _differing(stored: dict | None, job: dict) -> str:
    """In which of inputs, rules and options a stored job differs from this one."""
    if not isinstance(stored, dict):
        return "inputs, rules or options"
    names = {"sources": "inputs", "rules": "rules", "tokenizer": "options (--tokenizer, --vocab-size)"}
    differing = [name for key, name in names.items() if json.dumps(stored.get(key)) != json.dumps(job[key])]
    return listed(differing) if differing else "options (--shard-tokens)"


def put_in_place(out: Path) -> None:
    """Moves the finished replacement over the corpus of `out`; killed in the middle, it can be done again."""
    replacement = out / REPLACEMENT
    (out / MANIFEST).unlink(missing_ok=True)
    for name in _PARTS:
        if (replacement / name).exists():
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            (replacement / name).replace(out / name)


def clear(out: Path) -> None:
    """Removes what a finished corpus needs no more."""
    for name in (BLOCKS, REPLACEMENT):
        shutil.rmtree(out / name, ignore_errors=True)


def _check_empty(folder: Path) -> None:
    """Raises ValueError where a folder holds what `prepare` does not write."""
    ours = {*_PARTS, BLOCKS, LOCK, REPLACEMENT}
    foreign = {path.name for path in folder.iterdir() if path.name not in ours and path.suffix != ".tmp"}
    if foreign:
        raise ValueError(f"{folder} is not empty (it holds {', '.join(sorted(foreign)[:3])}); choose another --out")


def _start_or_resume(folder: Path, job: dict) -> None:
    if not same_job(stored_job(folder), job):
        _check_empty(folder)
        (folder / JOB).unlink(missing_ok=True)
        shutil.rmtree(folder / BLOCKS, ignore_errors=True)  # to have the room
        (folder / TOKENIZER).unlink(missing_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    blocks = blocks_of(folder, job)
    blocks.mkdir(parents=True, exist_ok=True)
    for leftover in [*folder.glob("*.tmp"), *folder.glob("tokenizer/*.tmp"), *blocks.glob("*.tmp")]:
        leftover.unlink(missing_ok=True)
    (folder / "tokenizer").mkdir(exist_ok=True)
    write_atomically(folder / JOB, json.dumps(job))
