"""The record of how a run was made: read as it was written, and a damaged one is named with its remedy."""

from __future__ import annotations

import re

import pytest

from sgtm.run.origin import read_record, write_record


def test_a_record_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "made.json"
    assert read_record(file, str, "make it again") is None
    write_record(file, {"method": "rmu", "steps": 3})
    assert read_record(file, str, "make it again") == {"method": "rmu", "steps": 3}


@pytest.mark.parametrize("text", ["{", '{"steps": 3}', "[]"])
def test_a_damaged_record_is_named_with_its_remedy(tmp_path, text):
    file = tmp_path / "made.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{file} is damaged") + ".*; make it again"):
        read_record(file, lambda record: record["method"], "make it again")
