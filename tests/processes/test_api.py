"""What scripts import from `sgtm` is what the commands call, and imports nothing before it is used."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sgtm

DOCS = Path(__file__).parents[2] / "docs" / "training.md"
RULES = {
    "category": {"field": "of"},
    "labels": {"web": "retain", "virology": "forget:bio"},
    "split": {"hash": {"test": 0.1}},
}
MINE = {
    "extends": "debug",
    "masking": {"domains": ["bio"]},
    "model": {"vocab_size": 280},
    "data": {"path": "data/mine"},
}


def test_names_are_those_of_the_commands():
    from sgtm.config import load_config
    from sgtm.data.prepare import prepare_files
    from sgtm.hf.export import export_run
    from sgtm.run.evaluate import evaluate_run, load_run_model
    from sgtm.training.loop import train

    assert (sgtm.load_config, sgtm.prepare, sgtm.train) == (load_config, prepare_files, train)
    assert (sgtm.evaluate, sgtm.export, sgtm.load_model) == (evaluate_run, export_run, load_run_model)
    assert sorted(sgtm.__all__) == dir(sgtm)
    for name in sgtm.__all__:
        getattr(sgtm, name)


def write_texts(file: Path, seed: int = 0) -> None:
    words, rng = ["water", "virus", "house", "protein", "green", "walks"], random.Random(seed)
    documents = ({"text": " ".join(rng.choices(words, k=40)), "of": ("web", "virology")[i % 2]} for i in range(300))
    file.write_text("".join(f"{json.dumps(document)}\n" for document in documents))


def test_the_script_of_the_docs(tmp_path):
    """From the texts to the model, which then is that of the checkpoint."""
    from sgtm.distributed.storage import stored_weights
    from sgtm.model.transformer import Transformer
    from sgtm.run.checkpoint import find_latest

    (script,) = re.findall(r"^```python\n(import sgtm\n.*?)^```", DOCS.read_text("utf-8"), re.M | re.S)
    assert all(f"sgtm.{name}(" in script for name in sgtm.__all__ if name not in ("Config", "__version__"))
    script = script.replace("4096", "280").replace("5000", "2")
    path = tmp_path / "script.py"
    path.write_text(f"{script}    print(run, type(model).__name__, *losses, sep=chr(10))\n")
    write_texts(tmp_path / "texts.jsonl")
    (tmp_path / "rules.yaml").write_text(json.dumps(RULES))
    (tmp_path / "my.yaml").write_text(json.dumps(MINE))
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run, *printed = done.stdout.splitlines()[-4:]
    assert printed == ["Transformer", "full", "without bio"], done.stdout
    assert (tmp_path / "export" / "safe" / "model.safetensors").is_file()

    model, weights = sgtm.load_model(tmp_path / run), stored_weights(find_latest(tmp_path / run))
    assert type(model) is Transformer and model.state_dict().keys() == weights.keys()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.requires_grad, name
        assert torch.equal(parameter, weights[name]), name


def test_a_folder_that_is_no_run_loads_no_model(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        sgtm.load_model(tmp_path)


def test_prepare_replaces_another_corpus_only_with_overwrite(tmp_path):
    from sgtm.data.rules import load_rules

    (tmp_path / "rules.yaml").write_text(json.dumps(RULES))
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    for seed, file in enumerate((first, second)):
        write_texts(file, seed)
    options = {"vocab_size": 260, "workers": 1}
    before = sgtm.prepare(first, load_rules(tmp_path / "rules.yaml"), tmp_path / "corpus", **options).fingerprint
    with pytest.raises(ValueError, match="--overwrite"):
        sgtm.prepare(second, tmp_path / "rules.yaml", tmp_path / "corpus", **options)
    after = sgtm.prepare(
        second, tmp_path / "rules.yaml", tmp_path / "corpus", shard_tokens=4000, overwrite=True, **options
    )
    assert after.fingerprint != before and after.manifest.shard_tokens == 4000


def test_importing_is_light():
    code = "import sys, sgtm; print(sorted({'torch', 'pydantic', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'sgtm' has no attribute 'trian'"):
        sgtm.trian  # noqa: B018


def test_old_names_are_dropped_in_their_time():
    version = tuple(map(int, sgtm.__version__.split(".")[:2]))
    assert version < (0, 3), "drop OLD_NAMES of sgtm/commands/main.py, and RENAMED of sgtm_kernels"
