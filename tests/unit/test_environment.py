"""Where a run was trained: a line for every start, of which the last is read back."""

from pathlib import Path

import pytest

from sgtm.run.environment import FILE, last_environment, record_environment


def test_the_newest_start_is_read_back_and_the_others_stay(tmp_path: Path, monkeypatch):
    for commit in ("c0", "c1"):
        monkeypatch.setattr("sgtm_kernels.measurement.environment", lambda commit=commit: {"commit": commit})
        record_environment(tmp_path)
    assert last_environment(tmp_path) == {"commit": "c1"}
    assert (tmp_path / FILE).read_text() == '{"commit": "c0"}\n{"commit": "c1"}\n'


@pytest.mark.parametrize("content", [None, "", '{"commit": "c0"}\n{"comm'], ids=["none", "empty", "half a line"])
def test_a_run_without_a_whole_last_line_has_none(tmp_path: Path, content):
    if content is not None:
        (tmp_path / FILE).write_text(content)
    assert last_environment(tmp_path) is None
