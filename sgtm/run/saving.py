"""Saves a run while it trains on.

Training stands still while its state is copied in memory (sgtm/distributed/writer.py); a thread of every rank writes
the copy. When all have written, the next step's `poll` publishes the checkpoint: manifest, rename, `latest`. There is
one checkpoint in the making at most: `start` waits for the one before.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from sgtm.config.schema import Config
from sgtm.distributed.on_ranks import on_every_rank, on_rank_zero
from sgtm.files import sync_directory, write_atomically
from sgtm.run.checkpoint import (
    TRAINING,
    checkpoints_dir,
    find_latest,
    finished,
    resolved,
    step_of,
    write_manifest,
)
from sgtm.run.resume import resume_command

if TYPE_CHECKING:
    from sgtm.distributed.engine import Engine


class Saved(NamedTuple):
    """A checkpoint that is in place.

    paused   seconds that training stood still
    seconds  from copy to rename
    problem  what failed once it was in place: the update of `latest`, or the deletion of old checkpoints; else empty
    """

    path: Path
    step: int
    bytes: int
    paused: float
    seconds: float
    problem: str = ""


class CheckpointWriter:
    """Writes the checkpoints of a run. All ranks make every call together, and see the same directory.

    corpus  fingerprint of the data, which a resumed run must share
    independent_of  domains of whose text the safe model is independent (sgtm/masking/certificate.py)
    direction  SHA-256 of the file of `steering.direction`, which a resumed run must share
    first   is called on rank 0 before a checkpoint is put in place, to flush what must not be older than it

    Every rank raises OSError, naming the file, the reason and the checkpoint that remains, if any rank cannot write.
    """

    def __init__(
        self,
        engine: Engine,
        run_dir: Path | str,
        config: Config,
        corpus: str = "",
        independent_of: Sequence[str] = (),
        first: Callable[[], None] = lambda: None,
        direction: str | None = None,
    ):
        self.first, self.direction = first, direction
        self.engine, self.config, self.corpus, self.independent_of = engine, config, corpus, list(independent_of)
        self.root = checkpoints_dir(run_dir)
        self._step: int | None = None
        self._began = self._paused = 0.0
        self._removal: threading.Thread | None = None

    def start(self, step: int, progress: object = None) -> list[Saved]:
        """Begin to save the run after `step` global steps; returns what is in place by now: the checkpoint before, if
        that was in the making, and without `train.async_checkpoint` this one.

        progress  whatever this rank needs to resume in the middle of an interval; `load_checkpoint` gives it back
        """
        before = self.finish()
        self._step, self._began = step, time.perf_counter()
        try:
            on_rank_zero(lambda: _fresh(self._temporary))
            ranks = on_every_rank(lambda: {"random": _random_state(self.engine), "progress": progress})
            self.engine.save(self._temporary, step, {"step": step, "ranks": ranks})
        except OSError as error:
            raise self._failed(error) from error
        self._paused = time.perf_counter() - self._began
        now = None if self.config.train.async_checkpoint else self.finish()
        return [saved for saved in (before, now) if saved]

    def poll(self) -> Saved | None:
        """The checkpoint in the making, if by now all ranks have written it; a collective call while there is one."""
        if self._step is None:
            return None
        busy = torch.tensor(float(self.engine.saving))
        if self.engine.world_size > 1:
            busy = self.engine.all_reduce_sum(busy)
        return None if busy > 0 else self.finish()

    def finish(self) -> Saved | None:
        """Wait for the checkpoint in the making, and put it in place; None if there is none."""
        if self._step is None:
            return None
        waited = time.perf_counter()
        try:
            files = self.engine.saved()
            manifest = {
                "kind": TRAINING,
                "step": self._step,
                "ranks": self.engine.world_size,
                "corpus": self.corpus,
                "config": resolved(self.config),
                "independent_of": self.independent_of,
                "direction": self.direction,
                "files": files,
            }
            final, keep = self._final, (self.config.train.keep_last, self.config.train.keep_every)
            retired, problem = on_rank_zero(lambda: self._publish(final, manifest, keep))
        except OSError as error:
            raise self._failed(error) from error
        self._remove(retired)
        ended = time.perf_counter()
        size = sum(entry["bytes"] for entry in files.values())
        saved = Saved(final, self._step, size, self._paused + ended - waited, ended - self._began, problem)
        self._step = None
        return saved

    def close(self) -> Saved | None:
        """As `finish`, and what is not kept is deleted by the time it returns."""
        saved = self.finish()
        if self._removal is not None:
            self._removal.join()
        return saved

    def _publish(self, final: Path, manifest: dict, keep: tuple[int, int]) -> tuple[list[Path], str]:
        self.first()
        return publish(self._temporary, final, manifest, *keep)

    @property
    def _final(self) -> Path:
        return self.root / f"step_{self._step:08d}"

    @property
    def _temporary(self) -> Path:
        return self.root / f".tmp-{self._final.name}"

    def _failed(self, error: OSError) -> OSError:
        """The error for the user, after what was written of the checkpoint has been removed."""
        on_rank_zero(lambda: shutil.rmtree(self._temporary, ignore_errors=True))
        final, self._step = self._final, None
        latest = find_latest(self.root.parent)
        rest = f"the last checkpoint is {latest}" if latest else "no checkpoint was saved before"
        command = resume_command(self.root.parent, self.engine.world_size)
        return OSError(f"checkpoint {final} could not be saved: {error}; {rest}. Fix the disk, then resume: {command}")

    def _remove(self, retired: list[Path]) -> None:
        """In a thread of rank 0: deleting large files takes a while on a shared disk."""
        if self.engine.rank or not retired:
            return
        if self._removal is not None:
            self._removal.join()
        self._removal = threading.Thread(target=_delete, args=(retired,))
        self._removal.start()


def publish(
    temporary: Path, final: Path, manifest: dict, keep_last: int, keep_every: int = 0
) -> tuple[list[Path], str]:
    """Put what was written to `temporary` in place, and take away what is not to be kept.

    Returns what to delete, and which step failed once it was in place, and why, or an empty text. What is taken away
    gets a temporary name first, so that a kill leaves no half of a checkpoint.
    """
    write_manifest(temporary, manifest)
    sync_directory(temporary)
    retired = [_retire(final)] if final.exists() else []  # not a valid one: the newest valid one is resumed from
    os.replace(temporary, final)
    sync_directory(final.parent)
    failed = "`latest` could not be updated"
    try:  # it is saved: what goes wrong from here on does not end the run
        write_atomically(final.parent / "latest", final.name + "\n")
        failed = "old checkpoints could not be deleted"
        earlier = [path for path in finished(final.parents[1]) if step_of(path) < step_of(final)]
        for path in earlier[keep_last - 1 :]:
            if not _kept_for_good(path, keep_every):
                retired.append(_retire(path))
    except OSError as error:
        return retired, f"{failed}: {error.filename}: {error.strerror}"
    return retired, ""


def _kept_for_good(path: Path, keep_every: int) -> bool:
    return keep_every > 0 and step_of(path) % keep_every == 0


def _retire(path: Path) -> Path:
    aside = path.with_name(f".tmp-retired-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def _delete(paths: Sequence[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def _fresh(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _random_state(engine: Engine) -> dict:
    """The random state of this rank: of torch on the CPU and on its GPU."""
    state = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(engine.device)
    return state
