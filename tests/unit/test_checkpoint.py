"""Which checkpoint counts, and when: the order of writing, what is kept, what is taken when one is damaged.

`tests/dist/test_checkpoint.py` saves and loads real ones.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_config

from sgtm.commands.main import main
from sgtm.run import checkpoint, saving
from sgtm.run import evaluate as evaluation
from sgtm.run.checkpoint import find_latest, finished, open_run, verify
from sgtm.run.evaluate import evaluate_run
from sgtm.run.metrics import MetricsLog, read_metrics
from sgtm.run.resume import _refuse_other_run
from sgtm.run.saving import publish

CONFIG = tiny_config()


def manifest_of(folder: Path, corpus: str = "of the run") -> dict:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
    }
    return {"step": 1, "ranks": 1, "corpus": corpus, "config": checkpoint.resolved(CONFIG), "files": files}


def make(run: Path, *steps: int) -> list[Path]:
    """Whole checkpoints of these steps, published in this order."""
    for step in steps:
        temporary = run / "checkpoints" / f".tmp-{step}"
        temporary.mkdir(parents=True)
        (temporary / "weights").write_text(f"of step {step}")
        publish(temporary, run / f"checkpoints/step_{step:08d}", manifest_of(temporary), keep_last=9)
    return [run / f"checkpoints/step_{step:08d}" for step in steps]


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", b"step_00000001\n", b"step_\0", b"notes"])
def test_the_newest_counts_whatever_the_pointer_says(tmp_path: Path, content: bytes | None):
    """A kill between the rename and the pointer leaves a newer one than it names."""
    older, newest = make(tmp_path, 1, 2)
    for other in ("notes", "step_backup", "step_00000001.bak", "step_00000003_of_march"):
        (tmp_path / "checkpoints" / other).mkdir()
    pointer = tmp_path / "checkpoints/latest"
    assert pointer.read_text() == f"{newest.name}\n"
    pointer.unlink() if content is None else pointer.write_bytes(content)
    assert find_latest(tmp_path) == newest and finished(tmp_path) == [newest, older]
    assert finished(tmp_path / "nowhere") == []


@pytest.mark.parametrize("at", [".tmp-2", "latest"])
def test_killed_while_it_is_put_in_place(tmp_path: Path, monkeypatch, at: str):
    """Before the rename the older one stands, after it the newer; the pointer moves last."""
    (older,) = make(tmp_path, 1)
    rename, write = os.replace, saving.write_atomically

    def killed_in_rename(source, target) -> None:
        if Path(source).name == at:
            raise KeyboardInterrupt
        rename(source, target)

    def killed_in_write(path, text) -> None:
        if path.name == at:
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(saving.os, "replace", killed_in_rename)
    monkeypatch.setattr(saving, "write_atomically", killed_in_write)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, 2)
    assert (tmp_path / "checkpoints/latest").read_text() == f"{older.name}\n"
    expected = older if at == ".tmp-2" else older.with_name("step_00000002")
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


@pytest.mark.parametrize("at", ["write_atomically", "_retire"])
def test_what_goes_wrong_after_it_is_in_place_does_not_end_the_run(tmp_path: Path, monkeypatch, at: str):
    """A disk that fills up just before `latest`, or an earlier checkpoint that may not be moved."""
    (older,) = make(tmp_path, 1)
    original = getattr(saving, at)

    def refused(path: Path, *content: str):
        if path.name in ("latest", older.name):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return original(path, *content)

    monkeypatch.setattr(saving, at, refused)
    temporary = tmp_path / "checkpoints/.tmp-2"
    temporary.mkdir()
    (temporary / "weights").write_text("of step 2")
    final = tmp_path / "checkpoints/step_00000002"
    retired, problem = publish(temporary, final, manifest_of(temporary), keep_last=1)
    assert retired == [] and problem.endswith(": No space left on device")
    assert finished(tmp_path) == [final, older]
    verify(final)


@pytest.mark.parametrize("unreadable", ["weights", checkpoint.MANIFEST])
def test_one_that_cannot_be_read_is_passed_over(tmp_path: Path, monkeypatch, unreadable: str):
    """A bad sector is an OSError, not a file that is cut short."""
    older, newest = make(tmp_path, 1, 2)

    def bad_sector(original):
        def read(path: Path, *arguments):
            if path == newest / unreadable:
                raise OSError(errno.EIO, "Input/output error")
            return original(path, *arguments)

        return read

    monkeypatch.setattr(checkpoint, "sha256_of", bad_sector(checkpoint.sha256_of))
    monkeypatch.setattr(Path, "read_text", bad_sector(Path.read_text))
    found, wrong = checkpoint.newest_whole(finished(tmp_path))
    assert found == older and wrong == {newest: f"{newest / unreadable} cannot be read: Input/output error"}


def test_damaged_ones_of_the_same_step_are_all_kept(tmp_path: Path):
    names = [checkpoint.set_aside(*make(tmp_path, 1)).name for _ in range(3)]
    assert names == ["damaged-step_00000001", "damaged-step_00000001-2", "damaged-step_00000001-3"]
    assert not finished(tmp_path) and len(list((tmp_path / "checkpoints").glob("damaged-*"))) == 3


def test_evaluation_takes_the_newest_whole_one(tmp_path: Path, capsys):
    oldest, older, newest = make(tmp_path, 1, 2, 3)
    (tmp_path / "config.yaml").write_text(json.dumps(CONFIG.model_dump(mode="json")))
    assert open_run(tmp_path)[1] == newest and not capsys.readouterr().err
    (newest / "weights").write_text("no")
    assert open_run(tmp_path)[1] == older
    problem = f"warning: {newest / 'weights'} has 2 bytes, written were 9: cut short?; taking {older}\n"
    assert capsys.readouterr().err == problem
    (older / "weights").write_text("of step X")
    (oldest / "weights").unlink()
    with pytest.raises(
        ValueError, match=r"no checkpoint is whole:\n.*has 2 bytes.*\n.*SHA-256.*\n.*is missing\nput back"
    ):
        open_run(tmp_path)
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        shutil.rmtree(tmp_path / "checkpoints")
        open_run(tmp_path)


def test_verifying_a_run_or_one_checkpoint(tmp_path: Path, capsys):
    older, newest = make(tmp_path, 1, 2)
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{newest}: whole\n{older}: whole\n"
    (newest / "weights").write_text("no")
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"{older}: whole\n" in said and f"damaged: {newest / 'weights'} has 2 bytes" in said
    assert main(["checkpoint", "verify", str(newest)]) == 1
    assert main(["checkpoint", "verify", str(older)]) == 0
    assert main(["checkpoint", "verify", str(tmp_path / "checkpoints")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", [{"files": []}, {"files": {}}, {"files": {"weights": {}}}, {"files": {"weights": {"bytes": 9}}}], ids=str
)
def test_a_damaged_manifest_is_named(tmp_path: Path, damage: dict):
    (saved,) = make(tmp_path, 1)
    file = saved / "manifest.json"
    checkpoint.write_manifest(saved, json.loads(file.read_text()) | damage)
    with pytest.raises(ValueError, match=r"step_00000001/manifest\.json is damaged: "):
        verify(saved)


def test_no_flipped_bit_of_a_manifest_is_taken_for_a_fact(tmp_path: Path):
    (saved,) = make(tmp_path, 1)
    file = saved / "manifest.json"
    content, expected = file.read_bytes(), checkpoint.read_manifest(saved)
    for position in range(len(content)):
        file.write_bytes(content[:position] + bytes([content[position] ^ 1 << position % 8]) + content[position + 1 :])
        try:
            assert checkpoint.read_manifest(saved) == expected, content[position - 20 : position + 20]
        except ValueError as error:
            assert "is damaged" in str(error)


def test_a_run_is_not_resumed_on_other_data(tmp_path: Path):
    """Wherever the same data are."""
    (saved,) = make(tmp_path, 1)
    _refuse_other_run(saved, CONFIG, "of the run")
    elsewhere = CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"path": "elsewhere"})})
    _refuse_other_run(saved, elsewhere, "of the run")
    with pytest.raises(
        ValueError, match=r"other settings:\n  data\.path: data holds other data than the run was trained on"
    ) as caught:
        _refuse_other_run(saved, CONFIG, "prepared anew")
    assert "--resume takes those of the run" not in str(caught.value)


def test_a_run_is_not_evaluated_on_other_data(tmp_path: Path, monkeypatch):
    make(tmp_path, 1)
    (tmp_path / "config.yaml").write_text(json.dumps(CONFIG.model_dump(mode="json")))
    corpus = SimpleNamespace(fingerprint="prepared anew", path="data")
    monkeypatch.setattr(evaluation, "open_corpus", lambda config, write: corpus)
    monkeypatch.setattr(evaluation, "check_corpus", lambda corpus, config: None)
    monkeypatch.setattr(evaluation, "load_model", lambda *rest: pytest.fail("evaluated"))
    with pytest.raises(ValueError, match=f"{tmp_path} was trained on other data than data holds now"):
        evaluate_run(tmp_path)


def test_a_damaged_log_is_refused_before_anything_is_computed(tmp_path: Path, monkeypatch):
    make(tmp_path, 1)
    (tmp_path / "config.yaml").write_text(json.dumps(CONFIG.model_dump(mode="json")))
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n{}\n")
    monkeypatch.setattr(evaluation, "open_corpus", lambda *rest, **options: SimpleNamespace(fingerprint="of the run"))
    monkeypatch.setattr(evaluation, "check_corpus", lambda corpus, config: None)
    monkeypatch.setattr(evaluation, "load_model", lambda *rest: pytest.fail("evaluated"))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: not UTF-8"):
        evaluate_run(tmp_path)
