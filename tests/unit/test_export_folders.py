"""Where an export may go: through links, into the working directory; and that failures leave nothing there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from exports import GPT_NEO, byte_corpus, make_run

from sgtm.hf import export
from sgtm.hf.export import export_run


@pytest.fixture(autouse=True)
def corpus(monkeypatch):
    monkeypatch.setattr(export, "open_corpus", lambda config, verify, write: byte_corpus())


def linked(folder: Path) -> Path:
    (folder / "real").mkdir()
    (folder / "link").symlink_to("real")
    return folder / "link"


def dangling(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "later")
    return folder / "link"


def working_directory(folder: Path) -> Path:
    (folder / "here").mkdir()
    os.chdir(folder / "here")
    return Path(".")


def link_in_the_path(folder: Path) -> Path:
    (folder / "real").mkdir()
    (folder / "link").symlink_to("real")
    return folder / "link" / "new"


FOLDERS = [linked, dangling, working_directory, link_in_the_path]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_may_be_reached_through_a_link_or_be_the_working_directory(tmp_path, monkeypatch, folder):
    make_run(tmp_path / "run", GPT_NEO)
    monkeypatch.chdir(tmp_path)
    out = folder(tmp_path)
    before, is_link = os.stat(out) if out.exists() else None, out.is_symlink()
    assert export_run(tmp_path / "run", [], out) == out
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(os.listdir(out))
    assert not [name for name in os.listdir(out) if "partial" in name]
    assert out.is_symlink() == is_link and (before is None or os.stat(out).st_ino == before.st_ino)
    assert f"# {out.resolve().name}\n" in (out / "README.md").read_text()
    with pytest.raises(ValueError, match="not an empty folder"):
        export_run(tmp_path / "run", [], out)


@pytest.mark.parametrize("folder", FOLDERS)
def test_failures_leave_an_empty_folder_empty(tmp_path, monkeypatch, folder):
    make_run(tmp_path / "run", GPT_NEO)
    monkeypatch.chdir(tmp_path)
    out = folder(tmp_path)
    replace = os.replace

    def full(source, target):
        if Path(target).name in ("config.json", "later", "new"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        export_run(tmp_path / "run", [], out)
    assert not out.exists() or not os.listdir(out)
