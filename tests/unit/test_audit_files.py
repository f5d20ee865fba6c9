"""sgtm/audit/files.py: which names an export may hold. Whole folders: tests/unit/test_audit.py."""

import json

from audited import relist

from sgtm.audit.files import WRITTEN_NAMES, file_problems
from sgtm.hf.card import RECORD

NAMES = ["config.json", "README.md", "model.safetensors", "model-00001-of-00012.safetensors", "tokenizer.json"]
OTHERS = [
    "model.bin",
    "xmodel.safetensors",
    "model-1-of-2.safetensors",
    "a/config.json",
    "modeling.py",
    "tokenizer.model",
]


def test_names_that_an_export_writes_and_no_others():
    assert all(WRITTEN_NAMES.fullmatch(name) for name in NAMES)
    assert not any(WRITTEN_NAMES.fullmatch(name) for name in OTHERS)


def test_files_are_those_of_the_record(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / RECORD).write_text(json.dumps({"files": {}, "tokenizer": True}))
    relist(tmp_path)
    record = json.loads((tmp_path / RECORD).read_text())
    assert file_problems(tmp_path, record) == []
    (tmp_path / "tokenizer.json").write_text("{}")
    relist(tmp_path)
    record |= json.loads((tmp_path / RECORD).read_text())
    assert file_problems(tmp_path, record) == []
    (problem,) = file_problems(tmp_path, record | {"tokenizer": False})
    assert problem == f"{tmp_path}/tokenizer.json: sgtm_export.json says that there is no tokenizer"
    (tmp_path / "config.json").write_text("[]")
    (problem,) = file_problems(tmp_path, record)
    assert problem.startswith(f"{tmp_path}/config.json: SHA-256 is ") and problem.endswith("...")
