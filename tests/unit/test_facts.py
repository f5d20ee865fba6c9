"""sgtm/audit/facts.py: configs held against what an export would write. Whole folders: tests/unit/test_audit.py."""

import json
from importlib.metadata import version

import pytest
from transformers import LlamaConfig

from sgtm.audit.facts import config_problems, tokenizer_problems
from sgtm.hf.export import save_config


@pytest.fixture
def folders(tmp_path):
    for name in ("folder", "scratch"):
        (tmp_path / name).mkdir()
    return tmp_path / "folder", tmp_path / "scratch"


def config() -> LlamaConfig:
    return LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=4, num_attention_heads=2, dtype="float32")


def record(transformers: str = version("transformers")) -> dict:
    return {"versions": {"transformers": transformers}}


def test_the_version_that_wrote_a_config_is_the_records(folders):
    folder, scratch = folders
    save_config(config(), folder)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "transformers_version": "1.2"}, indent=2) + "\n")
    assert config_problems(folder, record("1.2"), config(), scratch) == []
    assert [problem.partition(" is ")[0] for problem in config_problems(folder, record("1.3"), config(), scratch)] == [
        f"{folder / name}: transformers_version" for name in ("config.json", "generation_config.json")
    ]


def test_keys_that_cannot_be_known_are_left_out(folders):
    folder, scratch = folders
    other = config()
    other.eos_token_id = 5
    save_config(other, folder)
    assert len(config_problems(folder, record(), config(), scratch)) == 2
    assert config_problems(folder, record(), config(), scratch, ["eos_token_id"]) == []


def test_a_config_that_cannot_be_read_is_named(folders):
    folder, scratch = folders
    save_config(config(), folder)
    (folder / "config.json").write_text("{")
    assert [line.partition(": ")[0] for line in config_problems(folder, record(), config(), scratch)] == [
        f"{folder}/config.json"
    ]
    assert all("cannot be read" in problem for problem in tokenizer_problems(folder, scratch))
