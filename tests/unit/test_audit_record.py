"""sgtm/audit/record.py: what a record may hold. Whole folders: tests/unit/test_audit.py."""

from __future__ import annotations

import json

import pytest
from audited import evaluated_run

from sgtm.audit.record import read_export_record
from sgtm.hf.card import RECORD
from sgtm.hf.export import export_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    run = evaluated_run(tmp_path_factory.mktemp("llama"), "llama")
    return export_run(run, ["es"], run.parent / "safe")


@pytest.mark.parametrize("text", ["", "[]", '{"files": {"a": {}}}', '{"files": {}}', '{"files": 3}'])
def test_what_is_no_record_is_named(tmp_path, text):
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(ValueError, match=r"sgtm_export\.json is not the record of an export"):
        read_export_record(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("weights",), "A" * 9999, "weights: Extra inputs are not permitted"),
        (("removed",), None, "removed: Input should be a valid list"),
        (("removed",), [3], "removed: 0: Input should be a valid string"),
        (("tokenizer",), "no", "tokenizer: Input should be a valid boolean"),
        (("files",), {}, "files: Dictionary should have at least 1 item"),
        (("files", "config.json", "sha512"), "A" * 99, "files: config.json: sha512: Extra inputs"),
        (("files", "config.json", "sha256"), "A" * 64, "files: config.json: sha256: String should match"),
        (("versions", "numpy"), "1", "versions: numpy: Extra inputs"),
        (("versions", "torch"), "2 and weights", "versions: torch: String should match"),
        (("losses", "note"), "A" * 99, "losses: note: Extra inputs"),
        (("losses", "by"), "A" * 99, "losses: by: Input should be "),
        (("checkpoint", "note"), "A", "checkpoint: note: Extra inputs"),
        (("dtype",), "fp8", "dtype: Input should be "),
    ],
)
def test_nothing_else_has_room_in_a_record(folder, tmp_path, path, value, message):
    record = read_export_record(folder)
    *above, key = path
    inner = record
    for each in above:
        inner = inner[each]
    inner[key] = value
    (tmp_path / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    with pytest.raises(ValueError) as error:
        read_export_record(tmp_path)
    assert message in str(error.value) and str(tmp_path / RECORD) in str(error.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [("{\n", '{\n "run": "hidden",\n'), ("{\n", "{  \n"), ("}\n", "}\n\t"), ("\n}", ' ,"run": "small"\n}')],
)
def test_text_between_the_entries_is_found(folder, tmp_path, old, new):
    text = (folder / RECORD).read_text()
    (tmp_path / RECORD).write_text(text.replace(old, new, 1) if old == "{\n" else new.join(text.rsplit(old, 1)))
    with pytest.raises(ValueError, match=r"is not written as sgtm writes it|is not the record"):
        read_export_record(tmp_path)
