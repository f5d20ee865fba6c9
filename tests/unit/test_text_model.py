"""Runs and exported folders behind one interface: their logits, their tokenizers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from corpora import build, config_for, mixed_records, record
from exports import GPT_NEO, LLAMA
from random_models import moved_model
from text_models import LABELS, byte_run
from transformers import AutoModelForCausalLM

from sgtm.config import load_config
from sgtm.data.tokenizer import EOS
from sgtm.evaluation.subject import Subject
from sgtm.hf.export import export_run
from sgtm.inference.decoding import complete
from sgtm.inference.sources import find_model
from sgtm.inference.text_model import FolderModel, RunModel, open_models
from sgtm.masking.strategy import removal_tables
from sgtm.run.evaluate import load_run_model
from sgtm_kernels.plan import MaskPlan

IDS = [7, 200, 3, 250, 99]


def rows(model, ids, last=False) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([part for _, part in model.logits(ids, last)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run, its exports of the full model and without es, and the same of a Llama."""
    folder = tmp_path_factory.mktemp("models")
    for name, text in {"neo": GPT_NEO, "llama": LLAMA}.items():
        run = byte_run(folder, text, name)
        for export, remove in {"full": [], "safe": ["es"]}.items():
            export_run(run, remove, folder / f"{name}-{export}")
    return folder


def test_logits_of_a_run_are_those_of_its_model_without_the_groups_bit_for_bit(folder):
    source, model = find_model(folder / "neo"), load_run_model(folder / "neo")
    space = load_config(str(folder / "neo/config.yaml")).space
    removals = [(), ("es",), ("es", "fr")]
    opened = open_models(source, removals)
    assert [model.name for model in opened] == ["full", "without es", "without es,fr"]
    for removed, ours in zip(removals, opened, strict=True):
        with torch.no_grad():
            plan = MaskPlan.uniform(removal_tables(space, removed), 0, 1, len(IDS))
            expected = model.logits(torch.tensor([IDS]), plan)[0]
        assert torch.equal(rows(ours, IDS), expected)
        torch.testing.assert_close(
            rows(ours, IDS, last=True), expected[-1:], rtol=1e-6, atol=1e-6
        )  # a product of one row
    assert opened[0].subject.model is opened[1].subject.model


@pytest.mark.parametrize("name", ["neo", "llama"])
def test_an_export_reads_and_computes_as_its_run(folder, name):
    for export, removed in {"full": (), "safe": ("es",)}.items():
        (ours,), (theirs,) = (
            open_models(find_model(folder / path), [of]) for path, of in ((name, removed), (f"{name}-{export}", ()))
        )
        assert theirs.name == str(folder / f"{name}-{export}")
        text = f"Él {EOS} dijo\0"
        assert theirs.encode(text) == ours.encode(text) and ours.eos_id not in ours.encode(text)
        assert (theirs.context, theirs.eos_id, theirs.vocabulary) == (ours.context, ours.eos_id, ours.vocabulary)
        expected = rows(ours, IDS)
        torch.testing.assert_close(rows(theirs, IDS), expected, rtol=2e-5, atol=2e-5 * expected.abs().max().item())
        assert torch.equal(rows(theirs, IDS, last=True), rows(theirs, IDS)[-1:])


def test_greedy_completions_are_those_of_transformers(folder):
    """Of a model that has none of our code."""
    (ours,) = open_models(find_model(folder / "neo"), [("es",)])
    model = AutoModelForCausalLM.from_pretrained(folder / "neo-safe", dtype=torch.float32)
    prompt = torch.tensor([ours.encode("El gato")])
    generated = model.generate(prompt, max_new_tokens=9, do_sample=False, eos_token_id=ours.eos_id, pad_token_id=0)
    expected = generated[0, prompt.shape[1] :].tolist()
    completion = complete(ours, "El gato", 9)
    assert completion.ids == [token for token in expected if token != ours.eos_id] and completion.ids


def test_without_a_domain_in_adapters_the_model_is_the_base(tmp_path):
    config = config_for(context=16)
    corpus = build(tmp_path / "corpus", mixed_records(12))
    full, base = moved_model(config, 0.1), moved_model(config, 0.2)
    model = RunModel(Subject(full, corpus, config, bases={"es": base}))
    assert model.without(("es",)).subject.model is base and model.without(()).subject.model is full
    assert model.without(("es",)).without(()).subject.model is full


def test_a_run_whose_corpus_has_changed_is_refused(tmp_path):
    source = find_model(byte_run(tmp_path))
    other = [record(n, category, 30, split) for n, split in enumerate(("train", "test")) for category in LABELS]
    build(tmp_path / "other", other, LABELS)
    with pytest.raises(ValueError, match=r"was trained on another corpus than .*other; restore that corpus"):
        open_models(find_model(source.path, str(tmp_path / "other")))
    (tmp_path / "run/checkpoints/step_00000007/mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint is valid"):
        open_models(source)


def test_a_folder_that_does_not_load_or_fit_is_refused(folder, tmp_path):
    for name, content in {"config.json": None, "tokenizer.json": None, "tokenizer_config.json": None}.items():
        (tmp_path / name).write_bytes(content or (folder / "neo-full" / name).read_bytes())
    with pytest.raises(ValueError, match="does not load in transformers: "):
        FolderModel(tmp_path)
    weights = (folder / "neo-full/model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 300, "content": "<more>"})
    tokenizer["model"]["vocab"]["<more>"] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"tokenizer\.json has 301 entries, the model 257; copy both from one"):
        FolderModel(tmp_path)


def test_text_that_is_no_unicode_is_refused(folder):
    (model,) = open_models(find_model(folder / "neo"))
    with pytest.raises(ValueError, match=r"text: it has half a surrogate pair \(\\ud800\) at character 2"):
        model.encode("ab\ud800")
