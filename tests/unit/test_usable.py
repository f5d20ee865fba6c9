"""Whether a run directory may be used; tests/processes/test_loop.py has what training leaves of a refused one."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgtm.run.usable import check_usable


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory without a checkpoint."""
    folder = tmp_path / "runs" / "mine"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").touch()
    return folder


@pytest.mark.parametrize("options", [(False, False), (True, False), (False, True)], ids=["new", "resume", "overwrite"])
def test_what_is_not_there_or_empty_may_always_be_used(tmp_path: Path, options):
    check_usable(tmp_path / "runs" / "mine", *options)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    check_usable(tmp_path / "runs" / "mine", *options)
    assert not list((tmp_path / "runs" / "mine").iterdir())


def test_a_run_is_resumed_or_overwritten_where_that_is_asked(run: Path):
    with pytest.raises(ValueError, match=r"^run directory .*mine exists; continue with --resume, start over with --ov"):
        check_usable(run, resume=False, overwrite=False)
    check_usable(run, resume=True, overwrite=False)
    check_usable(run, resume=False, overwrite=True)


def test_a_file_in_the_place_of_the_folder_of_runs_is_named(tmp_path: Path):
    (tmp_path / "runs").touch()
    with pytest.raises(ValueError, match=r"^runs: .*runs is a file, but it takes a folder$"):
        check_usable(tmp_path / "runs" / "mine", resume=False, overwrite=False)


def test_checkpoints_of_other_names_are_not_passed_over_in_a_resume(run: Path):
    """Else the run would begin again; beside one that counts they are copies."""
    (run / "checkpoints" / "step_00000002.bak").mkdir()
    (run / "checkpoints" / "step_00000002.bak" / "manifest.json").touch()
    with pytest.raises(
        ValueError, match=r"checkpoints holds step_00000002\.bak, and no checkpoint named step_ and eig"
    ):
        check_usable(run, resume=True, overwrite=False)
    check_usable(run, resume=False, overwrite=True)
    (run / "checkpoints" / "step_00000001").mkdir()
    (run / "checkpoints" / "step_00000001" / "manifest.json").touch()
    check_usable(run, resume=True, overwrite=False)
