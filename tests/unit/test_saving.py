"""Putting a checkpoint in place: the order of writing, what is kept, and what may go wrong."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import CONFIG, make, manifest_of

from sgtm.run import checkpoint, saving
from sgtm.run.checkpoint import find_latest, finished, verify
from sgtm.run.metrics import MetricsLog, read_metrics
from sgtm.run.saving import publish


@pytest.mark.parametrize("name", [".tmp-2", "latest"])
def test_killed_while_it_is_put_in_place(tmp_path: Path, monkeypatch, name: str):
    """Before the rename the older one stands, after it the newer; the pointer moves last."""
    (older,) = make(tmp_path, 1)
    rename, write = os.replace, saving.write_atomically

    def killed_in_rename(source, target) -> None:
        if Path(source).name == name:
            raise KeyboardInterrupt
        rename(source, target)

    def killed_in_write(path, text) -> None:
        if path.name == name:
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(saving.os, "replace", killed_in_rename)
    monkeypatch.setattr(saving, "write_atomically", killed_in_write)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, 2)
    assert (tmp_path / "checkpoints/latest").read_text() == f"{older.name}\n"
    expected = older if name == ".tmp-2" else older.with_name("step_00000002")
    assert find_latest(tmp_path) == expected
    verify(expected)


def test_the_log_is_on_the_disk_before_a_checkpoint_is_in_place(tmp_path: Path, monkeypatch):
    """Else a power failure leaves a checkpoint whose steps have no lines."""
    events, fsync, rename = [], os.fsync, os.replace

    def synced(descriptor) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(source, target) -> None:
        events.append(str(target))
        rename(source, target)

    monkeypatch.setattr("sgtm.run.saving.on_rank_zero", lambda action: action())
    monkeypatch.setattr("sgtm.run.saving.on_every_rank", lambda action: [action()])
    monkeypatch.setattr("sgtm.run.saving._random_state", lambda engine: {})
    saved = {"weights": {"bytes": 0, "sha256": ""}}
    engine = SimpleNamespace(rank=0, world_size=1, save=lambda *rest: None, saved=lambda: saved)
    log = MetricsLog(tmp_path, CONFIG, rank=0, start=0)
    log.open()
    with log:
        writer = saving.CheckpointWriter(engine, tmp_path, CONFIG, first=log.sync)
        log.step({"step": 1, "seconds": 1.0, "loss": 2.0, "tokens_per_second": 3.0})
        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", renamed)
        writer.start(1)
        final = str(writer.finish().path)
    before = events[: events.index(final)]
    assert str(tmp_path / "metrics.jsonl") in before and str(tmp_path) in before
    assert final not in before and read_metrics(tmp_path / "metrics.jsonl")[0]["step"] == 1


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(1, 0, {7}), (2, 0, {6, 7}), (2, 3, {3, 6, 7}), (1, 2, {2, 4, 6, 7}), (9, 2, {1, 2, 3, 4, 5, 6, 7})],
)
def test_what_is_kept(tmp_path: Path, keep_last: int, keep_every: int, left: set[int]):
    retired, copies = [], [tmp_path / "checkpoints" / name for name in ("step_00000001.bak", "step_best")]
    for copy in copies:
        copy.mkdir(parents=True)
    for step in range(1, 8):
        temporary = tmp_path / "checkpoints" / f".tmp-{step}"
        temporary.mkdir(parents=True)
        (temporary / "weights").write_text(f"of step {step}")
        final = tmp_path / f"checkpoints/step_{step:08d}"
        gone, problem = publish(temporary, final, manifest_of(temporary), keep_last, keep_every)
        retired += gone
        assert not problem
    assert {int(path.name.removeprefix("step_")) for path in finished(tmp_path)} == left
    assert {path.name.removeprefix(".tmp-retired-") for path in retired} == {
        f"step_{step:08d}" for step in range(1, 8) if step not in left
    }
    checkpoint.remove_unfinished(tmp_path)  # what is taken away has a temporary name
    assert not any(path.exists() for path in retired) and len(finished(tmp_path)) == len(left)
    assert all(copy.exists() for copy in copies)


@pytest.mark.parametrize(
    ("function", "failed"),
    [
        ("write_atomically", "`latest` could not be updated"),
        ("_retire", "old checkpoints could not be deleted"),
    ],
)
def test_what_goes_wrong_after_it_is_in_place_does_not_end_the_run(
    tmp_path: Path, monkeypatch, function: str, failed: str
):
    """A disk that fills up just before `latest`, or an earlier checkpoint that may not be moved."""
    (older,) = make(tmp_path, 1)
    original = getattr(saving, function)

    def refused(path: Path, *content: str):
        if path.name in ("latest", older.name):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return original(path, *content)

    monkeypatch.setattr(saving, function, refused)
    temporary = tmp_path / "checkpoints/.tmp-2"
    temporary.mkdir()
    (temporary / "weights").write_text("of step 2")
    final = tmp_path / "checkpoints/step_00000002"
    retired, problem = publish(temporary, final, manifest_of(temporary), keep_last=1)
    assert (
        retired == [] and problem.startswith(f"{failed}: {tmp_path}/") and problem.endswith(": No space left on device")
    )
    assert finished(tmp_path) == [final, older]
    verify(final)
