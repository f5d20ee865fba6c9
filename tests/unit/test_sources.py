"""Which model a path names, and which domains can be removed from it, before anything is loaded."""

from __future__ import annotations

import json

import pytest
from adapted_records import RECORD
from exports import GPT_NEO
from text_models import byte_run

from sgtm.inference.sources import find_model
from sgtm.run.adapted import write_adapted


@pytest.fixture
def folder(tmp_path):
    """An exported folder, as far as its names go."""
    folder = tmp_path / "export"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


def test_domains_are_removed_in_the_order_of_the_config_and_others_refused(tmp_path):
    source = find_model(byte_run(tmp_path))
    assert source.removable == ("es", "fr")
    assert source.removed(["fr", "es"]) == ("es", "fr") and source.removed(["fr", "fr"]) == ("fr",)
    assert source.removed([]) == ()
    with pytest.raises(ValueError, match=r"unknown domain 'fra' \(did you mean fr\?\); known domains: es, fr"):
        source.removed(["es", "fra"])


def test_of_many_domains_no_sets_are_listed(tmp_path):
    many = [f"d{n}" for n in range(40)]
    text = GPT_NEO.replace(
        "{domains: [es, fr], forget_heads: {es: [0], fr: [2]}, forget_neurons: {es: [1, 8, 20], fr: 4}}",
        json.dumps({"domains": many, "forget_heads": 1, "forget_neurons": 1}),
    )
    text = text.replace(
        "hidden_size: 32, heads: 4, intermediate_size: 24", "hidden_size: 96, heads: 48, intermediate_size: 64"
    )
    (tmp_path / "corpus").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(text + f"data: {{path: {tmp_path / 'corpus'}}}\n")
    assert find_model(tmp_path / "run").removed(many[::-1]) == tuple(many)


def test_of_an_adapted_run_the_domain_in_adapters_is_removed(tmp_path):
    run = byte_run(tmp_path)
    write_adapted(run, RECORD)
    source = find_model(run)
    assert source.removed(["es"]) == ("es",)
    with pytest.raises(ValueError, match="unknown domain 'fr'; known domains: es"):
        source.removed(["fr"])


def test_nothing_is_removed_from_a_run_without_masks_or_an_export(tmp_path, folder):
    unmasked = find_model(byte_run(tmp_path, GPT_NEO.replace("masking: {", "masking: {strategy: none, ")))
    assert unmasked.removable == () == unmasked.removed([])
    with pytest.raises(ValueError, match="was trained without masks: no group of it holds es and fr, and nothing"):
        unmasked.removed(["es", "fr"])
    with pytest.raises(ValueError, match="is an exported folder, of which es cannot be removed: only its run has"):
        find_model(folder).removed(["es"])


def test_what_is_neither_run_nor_export_is_refused(tmp_path, folder):
    assert find_model(folder).config is None
    run = byte_run(tmp_path)
    with pytest.raises(ValueError, match=rf"not a run directory .*; runs here: .*{run}; nor is it an exported folder"):
        find_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"inside the run directory .*; nor is it an exported folder"):
        find_model(run / "checkpoints")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"export has no tokenizer\.json, so it cannot read a text; export the run ag"):
        find_model(folder)
    with pytest.raises(ValueError, match=r"no corpus at gone: the folder does not exist.*--data\.path DIR"):
        find_model(run, "gone")
    assert find_model(run, str(tmp_path / "corpus")).data == str(tmp_path / "corpus")
    (run / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"config\.yaml is empty; put back a copy of it") as raised:
        find_model(run)
    assert "exported folder" not in str(raised.value)
