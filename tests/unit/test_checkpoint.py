"""Which checkpoint counts: the newest whole one, and what is damaged is named.

`tests/unit/test_saving.py` puts them in place, and `tests/dist/test_checkpoint.py` saves and loads real ones.
"""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
from checkpoints import CONFIG, make

from sgtm.commands.main import main
from sgtm.run import checkpoint
from sgtm.run.checkpoint import find_latest, finished, open_run, verify


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
    folder, wrong = checkpoint.newest_whole(finished(tmp_path))
    assert folder == older and wrong == {newest: f"{newest / unreadable} cannot be read: Input/output error"}


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
    problem = f"warning: {newest / 'weights'} has 2 of 9 bytes (truncated); taking {older}\n"
    assert capsys.readouterr().err == problem
    (newest / "weights").write_text("of step 3 and more")
    assert open_run(tmp_path)[1] == older
    assert "has 18 bytes instead of 9; taking" in capsys.readouterr().err
    (newest / "weights").write_text("no")
    (older / "weights").write_text("of step X")
    (oldest / "weights").unlink()
    with pytest.raises(
        ValueError, match=r"no checkpoint is valid:\n.*has 2 of 9 bytes.*\n.*SHA-256.*\n.*is missing\nput back"
    ):
        open_run(tmp_path)
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        shutil.rmtree(tmp_path / "checkpoints")
        open_run(tmp_path)


def test_verifying_a_run_or_one_checkpoint(tmp_path: Path, capsys):
    older, newest = make(tmp_path, 1, 2)
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{newest}: valid\n{older}: valid\n"
    (newest / "weights").write_text("no")
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert f"{older}: valid\n" in output and f"damaged: {newest / 'weights'} has 2 of 9 bytes" in output
    assert main(["checkpoint", "verify", str(newest)]) == 1
    assert main(["checkpoint", "verify", str(older)]) == 0
    assert main(["checkpoint", "verify", str(tmp_path / "checkpoints")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_what_a_killed_run_had_begun_to_write_is_removed(tmp_path: Path):
    (saved,) = make(tmp_path, 1)
    (unfinished := saved.with_name(".tmp-step_00000002")).mkdir()
    (pointer := saved.with_name("latest.4711.tmp")).write_text("step_0000")  # as write_atomically leaves it
    checkpoint.remove_unfinished(tmp_path)
    assert not unfinished.exists() and not pointer.exists()
    assert finished(tmp_path) == [saved] and saved.with_name("latest").exists()


def test_reshape_takes_the_newest_valid_one_and_names_what_is_damaged(tmp_path: Path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr("sgtm.distributed.universal.write_universal", lambda *paths: written.append(paths))
    older, newest = make(tmp_path, 1, 2)
    command = ["checkpoint", "reshape", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'out'}\n" and not printed.err
    (newest / "weights").write_text("no")
    assert main(command) == 0
    assert str(newest / "weights") in capsys.readouterr().err
    assert written == [(newest, tmp_path / "out"), (older, tmp_path / "out")]
    (older / "weights").unlink()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert str(newest / "weights") in error and str(older / "weights") in error and len(written) == 2


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ([], "its JSON is not that of a manifest"),
        ({}, "it lists no files"),
        ({"weights": {}}, "key 'bytes' is missing"),
        ({"weights": {"bytes": 9}}, "key 'sha256' is missing"),
    ],
    ids=str,
)
def test_a_damaged_manifest_is_named(tmp_path: Path, files: object, problem: str):
    (saved,) = make(tmp_path, 1)
    file = saved / "manifest.json"
    manifest = {key: value for key, value in json.loads(file.read_text()).items() if key != "sha256"}
    checkpoint.write_manifest(saved, manifest | {"files": files})
    with pytest.raises(ValueError, match=rf"step_00000001/manifest\.json is damaged: {problem}$"):
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
