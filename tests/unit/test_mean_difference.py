"""A direction against a model whose activations are known, its record, and what is refused before anything runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import build, record
from exports import GPT_NEO, make_run

from sgtm.config.load import load_config
from sgtm.data.store import Corpus
from sgtm.files import sha256_of
from sgtm.masking.strategy import removal_tables
from sgtm.model.direction import read_direction
from sgtm.run.checkpoint import find_latest
from sgtm.unlearning import derived, mean_difference
from sgtm.unlearning.mean_difference import described, direction_of_text

LABELS = {"en": "retain", "de": "retain", "es": "forget:es", "fr": "forget:fr"}
FORGET, RETAIN = 7.0, 3.0


def documents(french_split: str = "test") -> list[dict]:
    texts = {"en": "a", "de": "b", "es": "z"}
    return [
        {**record(n, category, split=split), "text": letter * 40}
        for n in range(3)
        for category, letter in texts.items()
        for split in ("train", "test")
    ] + [record(0, "fr", 60, french_split)]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A run and, beside it, its corpus."""
    folder = tmp_path_factory.mktemp("source")
    corpus = build(folder / "corpus", documents(), LABELS)
    make_run(folder / "run", f"{GPT_NEO}data: {{path: {folder / 'corpus'}}}\n", corpus.fingerprint)
    return folder / "run"


@pytest.fixture
def constructed(source, monkeypatch):
    """The run with a model whose stream after block i is (i + 1) at 0, and at 1 a number of the token's letter."""
    corpus, load = Corpus.open(source.parent / "corpus"), derived.load_model

    def constructed(config, checkpoint):
        model = load(config, checkpoint)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in ("embedding", "position") or name.endswith(("w_o", "b_o", "w_out", "b_out")):
                    parameter.zero_()
            for letter, number in (("a", RETAIN), ("b", RETAIN), ("z", FORGET)):
                (token,) = corpus.tokenizer.encode(letter, add_special_tokens=False).ids
                model.embedding[token, 1] = number
            for block in model.blocks:
                block.mlp.b_out[0] = 1.0
        model.steering = object()  # to be left out
        return model

    monkeypatch.setattr(derived, "load_model", constructed)
    return source


def test_the_direction_of_a_constructed_model(constructed, tmp_path):
    out = tmp_path / "es.safetensors"
    written = direction_of_text(constructed, out, domain="es", layer=1)
    direction = read_direction(out)
    assert direction.record == written and "1*" in described(written)
    checkpoint = find_latest(constructed)
    assert {name: written[name] for name in ("run", "checkpoint", "step", "manifest_sha256", "domain", "layer")} == {
        "run": "small",
        "checkpoint": checkpoint.name,
        "step": 7,
        "manifest_sha256": sha256_of(checkpoint / "manifest.json"),
        "domain": "es",
        "layer": 1,
    }
    assert written["categories"] == {"forget": ["es"], "retain": ["en", "de"]} and written["split"] == "train"
    # Documents of 40 letters and an EOS, whose stream is 0 at 1; the last EOS of a category has no target.
    tokens, letters = written["tokens"], {"forget": 3 * 40, "retain": 6 * 40}
    assert tokens == {"forget": 3 * 40 + 2, "retain": 6 * 40 + 4}
    means = {}
    for name, number in (("forget", FORGET), ("retain", RETAIN)):
        share = letters[name] / tokens[name]
        means[name] = number * share
        for layer in range(2):
            expected = share * np.hypot(number, layer + 1) + (1 - share) * (layer + 1)
            assert written["norms"][name][layer] == pytest.approx(expected)
            assert written["projections"][name][layer] == pytest.approx(means[name])
    expected = np.zeros((2, 32), np.float32)
    expected[:, 1] = means["forget"] - means["retain"]
    np.testing.assert_allclose(direction.vectors, expected, rtol=1e-6, atol=1e-6)


def test_a_limit_takes_the_first_sequences_and_the_same_command_gives_the_same_bytes(constructed, tmp_path):
    outs = [tmp_path / f"{name}.safetensors" for name in ("all", "some", "again", "more")]
    whole, some, again, more = (
        direction_of_text(constructed, out, domain="es", sequences=limit)
        for out, limit in zip(outs, (None, 5, 5, 6), strict=True)
    )
    short = 10  # targets of a category's last sequence
    assert some["tokens"] == dict.fromkeys(("forget", "retain"), 4 * 16 + short)
    assert more["tokens"] == {"forget": 5 * 16 + short, "retain": 4 * 16 + 2 * short}
    assert outs[1].read_bytes() == outs[2].read_bytes() != outs[0].read_bytes() and again == some
    assert whole["tokens"]["forget"] < whole["tokens"]["retain"] and whole["layer"] == 1, "half of two blocks"


def test_the_default_layer_is_half_of_the_depth(tmp_path):
    """Of three blocks the second, neither the first nor the last."""
    corpus = build(tmp_path / "corpus", documents(), LABELS)
    config = GPT_NEO.replace("layers: 2", "layers: 3")
    assert config != GPT_NEO
    make_run(tmp_path / "run", f"{config}data: {{path: {tmp_path / 'corpus'}}}\n", corpus.fingerprint)
    written = direction_of_text(tmp_path / "run", tmp_path / "es.safetensors", domain="es", sequences=1)
    assert written["layer"] == 1


def test_the_model_is_the_full_one(constructed, tmp_path, monkeypatch):
    """Without the domain's group the stream of its text would be another."""
    tables = []
    means = mean_difference.mean_hidden
    monkeypatch.setattr(mean_difference, "mean_hidden", lambda *values: tables.append(values[2]) or means(*values))
    direction_of_text(constructed, tmp_path / "es.safetensors", domain="es")
    space = load_config(constructed / "config.yaml").space
    assert tables == [removal_tables(space, ())] * 2 != [removal_tables(space, ("es",))] * 2


@pytest.fixture
def untouched(source, monkeypatch):
    monkeypatch.setattr(derived, "load_model", lambda *rest: pytest.fail("computed"))
    return source


def refused(message: str, run: Path, out: Path, **options) -> None:
    with pytest.raises(ValueError, match=message):
        direction_of_text(run, out, **{"domain": "es", **options})
    assert not out.is_file()


def test_what_does_not_fit_is_refused_before_anything_is_computed(untouched, tmp_path):
    out = tmp_path / "es.safetensors"
    refused("has no domain 'bio'; its domains are es, fr", untouched, out, domain="bio")
    refused(r"has the domains es, fr; choose one with --domain", untouched, out, domain=None)
    refused("no text of category fr in its split train", untouched, out, domain="fr")
    for layer in (2, -1):
        refused(f"--layer {layer}: the model has 2 blocks, counted from 0", untouched, out, layer=layer)
    refused(r"--sequences 9: split train of .* has 8 of forget text; give at most 8, or", untouched, out, sequences=9)
    refused("not a run directory", tmp_path, out)
    refused("give a file in a folder that exists", untouched, tmp_path / "nosuch" / "es.safetensors")
    refused(r"whose name ends in \.safetensors", untouched, tmp_path / "es.pt")
    (tmp_path / "folder.safetensors").mkdir()
    refused("give a file", untouched, tmp_path / "folder.safetensors")


def test_a_corpus_that_is_gone_or_another_one_is_refused(untouched, tmp_path):
    moved, out = tmp_path / "moved", tmp_path / "es.safetensors"
    build(moved, documents("train"), LABELS)
    refused("was trained on another corpus than .*moved;", untouched, out, data=str(moved))
    shutil.rmtree(moved)
    refused("no corpus at .*moved", untouched, out, data=str(moved))


def test_hooks_are_removed(source, tmp_path, monkeypatch):
    models, load = [], derived.load_model
    monkeypatch.setattr(derived, "load_model", lambda *rest: models.append(load(*rest)) or models[-1])
    direction_of_text(source, tmp_path / "es.safetensors", domain="es", sequences=1)
    assert models and not any(block._forward_hooks for block in models[0].blocks)
