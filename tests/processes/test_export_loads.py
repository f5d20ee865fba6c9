"""An export in transformers: the ids of `prepare` and the logits of our model, whatever the tokenizer adds elsewhere.

In the installed version, and in transformers 4.57, which the Makefile installs beside it for `make test`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bare import python_path
from corpora import Records, write_jsonl
from exports import GPT_NEO, LLAMA, MIXTRAL, SHARED_EXPERTS, make_run
from hypothesis import given, settings
from load_export import loaded
from tokenizer_folders import ANY_TEXT, KINDS, PAD, write_folder
from transformers import AutoTokenizer

from sgtm.config import Config, load_config
from sgtm.data.discover import open_sources
from sgtm.data.encode import Encoder
from sgtm.data.plain_text import control_ids, plain_text
from sgtm.data.prepare import prepare
from sgtm.data.rules import Rules
from sgtm.data.store import TOKENIZER, Corpus
from sgtm.data.tokenizer import EOS
from sgtm.hf import export
from sgtm.hf.export import export_run
from sgtm.masking.strategy import removal_tables
from sgtm.model.transformer import Transformer
from sgtm_kernels.plan import MaskPlan

RULES = Rules.model_validate(
    {"category": {"constant": "en"}, "labels": {"en": "retain"}, "split": {"constant": "train"}}
)
TEXTS = ["the fox", " two  spaces\n", f"a {EOS} b", f"<s> {PAD}", "¿Qué? 🍒 it 's , \0 ."]
MODELS = {
    "gpt_neo": GPT_NEO,
    "llama": LLAMA.replace("tie_embeddings: false", "tie_embeddings: true, rope_theta: 500.0"),
    "mixtral": MIXTRAL.replace("tie_embeddings: false", "tie_embeddings: false, rope_theta: 500.0"),
    "granitemoeshared": SHARED_EXPERTS.replace("tie_embeddings: false", "tie_embeddings: true, rope_theta: 500.0"),
}
VOCABULARY = 640
"""Rows of the embedding: more than any of the tokenizers has tokens."""
CASES = [(kind, "llama", (), "pruned") for kind in KINDS] + [("bos", "gpt_neo", (), "pruned")]
CASES += [("bos", family, ("es",), form) for family in MODELS for form in ("pruned", "shards")]
CASES += [("bos", family, ("es",), "zeroed") for family in ("gpt_neo", "llama")]  # experts cannot be zeroed
CASES += [
    ("bos", family, remove, "pruned") for family in ("mixtral", "granitemoeshared") for remove in ((), ("es", "fr"))
]
ROOT = Path(__file__).parents[2]
FOUR = ROOT / ".venv" / "transformers-4"
"""Written by the Makefile."""


def exported(folder: Path, kind: str, family: str, remove: list[str], form: str = "pruned"):
    """(corpus, our model, its config, the export's folder) of a run on texts prepared with a tokenizer of this kind.

    form  `pruned`, `zeroed`, or `shards`: pruned, in several files of weights
    """
    tokenizer = write_folder(folder / "tokenizer", KINDS[kind][0](), eos_token=EOS, pad_token=PAD, bos_token="<s>")
    source = write_jsonl(folder / "a.jsonl", [{"text": text} for text in TEXTS])
    corpus = prepare(open_sources([source]), RULES, tokenizer, folder / "corpus", workers=1)
    text = MODELS[family].replace("vocab_size: 257", f"vocab_size: {VOCABULARY}").replace("context: 16", "context: 64")
    model = make_run(folder / "run", text + f"data: {{path: {folder / 'corpus'}}}\n", corpus.fingerprint)
    return (
        corpus,
        model,
        load_config(str(folder / "run/config.yaml")),
        export_run(
            folder / "run",
            remove,
            folder / "out",
            prune=form != "zeroed",
            shard=10_000 if form == "shards" else 10**9,
        ),
    )


@pytest.fixture(scope="module")
def export_of(tmp_path_factory) -> Callable:
    """`exported` of a case, the same whenever it is wanted."""

    @cache
    def make(kind: str, family: str, remove: tuple[str, ...] = (), form: str = "pruned"):
        return exported(tmp_path_factory.mktemp(kind), kind, family, list(remove), form)

    return make


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([*case[:2], *case[2], case[3]]))
def test_it_encodes_as_prepare_did_and_computes_what_our_model_does(export_of, case):
    check(case, loaded(export_of(*case)[-1], TEXTS), *export_of(*case)[:-1])


MISSING = not (FOUR / ".installed").is_file()


@pytest.mark.parametrize(
    ("version", "path"),
    [
        ("5.", []),
        pytest.param(
            "4.57.", [FOUR], marks=pytest.mark.skipif(MISSING, reason="no transformers 4.57: make test installs it")
        ),
    ],
)
def test_so_it_does_without_sgtm(export_of, tmp_path, version, path):
    """In a process that cannot import it; one for all, as its imports cost more than all exports."""
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    folders = {case: str(export_of(*case)[-1]) for case in CASES}
    command = [sys.executable, str(ROOT / "tests/load_export.py"), str(tmp_path / "texts.json"), *folders.values()]
    environment = {**os.environ, "PYTHONPATH": python_path(*path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    for case, folder in folders.items():
        assert facts[folder]["version"].startswith(version)
        check(case, facts[folder], *export_of(*case)[:-1])


def check(case: tuple, facts: dict, corpus: Corpus, model: Transformer, config: Config) -> None:
    """`facts`: what `loaded` returns of the export."""
    kind, family, remove, form = case
    assert facts["ids"] == [corpus.tokens(document)[:-1].tolist() for document in range(len(TEXTS))], case
    if KINDS[kind][1]:
        assert facts["decoded"] == TEXTS, case
    for ids, logits in zip(facts["ids"], facts["logits"], strict=True):
        plan = MaskPlan.uniform(removal_tables(config.space, list(remove)), 0, 1, len(ids))
        with torch.no_grad():
            ours = model.logits(torch.tensor([ids]), plan)[0]
        torch.testing.assert_close(torch.tensor(logits), ours, rtol=2e-5, atol=2e-5 * ours.abs().max().item())
    has_pad = corpus.tokenizer.token_to_id(PAD)
    roles = {"bos": None, "eos": corpus.eos_id, "pad": has_pad}
    assert facts["ids_of_roles"] == facts["ids_of_config"] == roles, case
    assert facts["unk"] == ("<unk>" if kind == "unigram" else None), case
    assert facts["tokens"] == len(corpus.tokenizer.get_vocab()) <= VOCABULARY, case  # loading has added none
    pruned = remove and family == "llama" and form != "zeroed"  # 3 heads, which the Llama of transformers 5 refuses
    assert facts["architecture"] == ("mistral" if pruned else family), case
    assert facts["generated"] >= 1, case


def test_any_text_is_encoded_as_in_prepare_without_a_control_id_and_comes_back(export_of):
    tokenizers = {}
    for kind, (_, lossless) in KINDS.items():
        corpus, *_, out = export_of(kind, "llama")
        controls = control_ids(corpus.tokenizer, corpus.eos_id)
        encoder = Encoder(RULES, corpus.path / TOKENIZER, corpus.eos_id, corpus.manifest.vocab_size, 10**6)
        tokenizers[kind] = AutoTokenizer.from_pretrained(out), encoder, controls, lossless

    @settings(max_examples=60, deadline=None)
    @given(ANY_TEXT)
    def examine(text):
        for kind, (tokenizer, encoder, controls, lossless) in tokenizers.items():
            ids = tokenizer(text)["input_ids"]
            assert controls.isdisjoint(ids), kind
            if text.strip():
                assert encoder.encode(Records(({"text": text},))).tokens.tolist() == [*ids, encoder.eos_id], kind
            if lossless:
                assert tokenizer.decode(ids) == text, kind

    examine()


@pytest.mark.parametrize("family", MODELS)
def test_the_base_of_the_rotation_is_spelled_in_both_ways(tmp_path, family):
    *_, out = exported(tmp_path, "ours", family, [])
    config = json.loads((out / "config.json").read_text())
    if family != "gpt_neo":
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0
    else:
        assert "rope_theta" not in config
    assert "transformers 4.57 and 5" in (out / "README.md").read_text()


def test_another_architecture_is_said_and_why(tmp_path, capsys):
    *_, out = exported(tmp_path, "ours", "llama", ["es"])
    because = "3 heads do not divide hidden_size 32, which the Llama of transformers 5 insists on"
    assert f"exported as mistral: {because}" in capsys.readouterr().err
    assert f"Its architecture is `mistral`: {because}" in (out / "README.md").read_text()
    assert json.loads((out / "sgtm_export.json").read_text())["architecture_because"].startswith(because)
    (tmp_path / "whole").mkdir()
    *_, out = exported(tmp_path / "whole", "ours", "llama", [])
    assert "exported as" not in capsys.readouterr().err and "mistral" not in (out / "README.md").read_text()
    assert json.loads((out / "sgtm_export.json").read_text())["architecture_because"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_corpus_of_an_earlier_version_is_exported_as_text_too(tmp_path, monkeypatch, kind):
    """Its tokenizer lies there as it was given to `prepare`."""
    tokenizer = KINDS[kind][0]()
    eos = tokenizer.token_to_id(EOS)
    corpus = SimpleNamespace(tokenizer=tokenizer, eos_id=eos, token_names={}, fingerprint="of the run", path="data")
    monkeypatch.setattr(export, "open_corpus", lambda config, verify, write: corpus)
    make_run(tmp_path / "run", LLAMA.replace("vocab_size: 257", f"vocab_size: {VOCABULARY}"))
    exported_tokenizer = AutoTokenizer.from_pretrained(export_run(tmp_path / "run", [], tmp_path / "out"))
    for text in ("the fox", f"a {EOS} b"):
        assert exported_tokenizer(text)["input_ids"] == plain_text(tokenizer, {EOS}).encode(text).ids
    assert eos not in exported_tokenizer(f"a {EOS} b")["input_ids"]


def test_the_tokenizer_is_written_for_both_versions(tmp_path):
    """Transformers 4 lacks the class of 5, and there GPT-Neo adds embeddings of token types to its input."""
    *_, out = exported(tmp_path, "bos", "gpt_neo", [])
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert config["eos_token"] == EOS and config["pad_token"] == PAD and "bos_token" not in config
