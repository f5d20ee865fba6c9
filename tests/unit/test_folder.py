"""sgtm/hf/folder.py: what has not ended is not there. Links and such: tests/unit/test_export_folders.py."""

import os
import socket

import pytest

from sgtm.hf.folder import check_empty, filled


def test_the_files_are_there_when_the_block_ends(tmp_path):
    with filled(tmp_path / "deep" / "out", "last") as partial:
        (partial / "last").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "last").read_text() == "x"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [True, False])
def test_after_an_error_there_are_none(tmp_path, error, exists):
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    with pytest.raises(error), filled(out, "last") as partial:
        (partial / "first").write_text("x")
        raise error
    assert out.exists() == exists and not list(tmp_path.glob("*/*")) and len(list(tmp_path.iterdir())) == exists


def test_in_an_empty_folder_the_last_file_comes_last(tmp_path, monkeypatch):
    order, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (order.append(target.name), replace(source, target)))
    with filled(tmp_path, "b") as partial:
        for name in "abc":
            (partial / name).write_text(name)
    assert sorted(order) == ["a", "b", "c"] and order[-1] == "b"


def test_what_a_killed_process_has_left_is_removed_and_nothing_else(tmp_path):
    ended, running = 2**22 + 1, os.getpid()
    names = [f".out.partial-{socket.gethostname()}-{ended}", f".out.partial-{socket.gethostname()}-{running}"]
    names += [f".out.partial-elsewhere-{ended}", ".out.partial-notes", f".other.partial-{socket.gethostname()}-{ended}"]
    for name in names:
        (tmp_path / name).mkdir()
    assert check_empty(tmp_path / "out") == (tmp_path / "out").resolve()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="exists and is not an empty folder; export to a new one"):
        check_empty(tmp_path)
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        check_empty(tmp_path / "file")
